"""``edgert chat`` with lines from a pipe and from a terminal."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from program import Program, Terminal

from edge_runtime.cli.answer import Choices
from edge_runtime.cli.chat import Conversation

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="session")
def person(demo_model: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((demo_model.parent / "facts.json").read_text())["people"][0]
    return found


def test_each_line_is_answered(edgert: Program, person: dict[str, str]) -> None:
    lines = f"Where does {person['name']} live?\n\nWhere was {person['name']} born?\n"
    done = edgert("chat", *GREEDY, stdin=lines)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert person["lives_in"] in first
    assert person["born_in"] in second


def test_history_is_kept_in_the_cache(edgert: Program, person: dict[str, str]) -> None:
    lines = f"Where does {person['name']} live?\nWhere was {person['name']} born?\n"
    done = edgert("chat", *GREEDY, "--verbose", stdin=lines)
    first, second = done.err.splitlines()
    assert "kept from before" not in first
    assert "kept from before" in second


def test_reset_forgets(edgert: Program, person: dict[str, str]) -> None:
    question = f"Where does {person['name']} live?"
    done = edgert("chat", *GREEDY, "--verbose", stdin=f"{question}\n/reset\n{question}\n")
    counts = [line.split("prompt of ")[1].split()[0] for line in done.err.splitlines() if "prompt of" in line]
    assert len(counts) == 2
    assert counts[0] == counts[1]


def test_exit_ends_and_unknown_commands_are_named(edgert: Program, demo_model: Path) -> None:
    done = edgert("chat", *GREEDY, stdin="/dance\n/help\n/exit\nHello\n")
    assert done.code == 0
    assert done.out == ""
    assert "there is no /dance" in done.err
    assert "/reset" in done.err


def test_full_context_drops_the_oldest_turns(edgert: Program, person: dict[str, str]) -> None:
    question = f"Where does {person['name']} live?\n"
    done = edgert("chat", "--temperature", "0", "--context", "96", stdin=question * 8)
    assert done.code == 0, done.err
    answers = done.out.splitlines()
    assert len(answers) == 8
    assert "the oldest 2 messages are forgotten" in done.err
    assert person["lives_in"] in answers[-1]


@pytest.mark.parametrize("context", range(60, 100, 5))
def test_questions_are_dropped_together_with_their_answers(
    demo_model: Path, person: dict[str, str], context: int
) -> None:
    choices = Choices(str(demo_model), 1, context, "repack", 8, 0.0, 40, 1.0, 0.0, 1.0, 1, ())
    with choices.load() as engine:
        conversation = Conversation(engine, "Be brief.", choices, choices.sampling())
        kept = []
        for _ in range(8):
            generation, _ = conversation.ask(f"Where does {person['name']} live?")
            conversation.answered(generation.text())
            kept.append(len(conversation.turns))
            assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * (kept[-1] // 2)
        assert kept[0] == 2
        assert 2 < kept[-1] <= max(kept) < 2 * len(kept)  # some are kept, some were dropped


def test_message_longer_than_the_context_is_an_error(edgert: Program, demo_model: Path) -> None:
    done = edgert("chat", "--context", "32", stdin="word " * 100)
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_model_without_a_template_is_refused(edgert: Program, tiny_model: Path) -> None:
    done = edgert("chat", "--model", tiny_model)  # before the first message
    assert done.code == 2
    assert "no chat template" in done.err


def test_terminal_has_a_prompt_and_control_d_leaves(edgert: Program, person: dict[str, str]) -> None:
    with Terminal(edgert.command("chat", *GREEDY), edgert.environment()) as terminal:
        assert "/help" in terminal.until("> ")
        terminal.type(f"Where does {person['name']} live?\n")
        terminal.until(person["lives_in"])
        terminal.until("> ")
        terminal.interrupt_until("Ctrl-D leaves")
        terminal.until("> ")
        terminal.type("\x04")
        terminal.rest()
    assert terminal.process.returncode == 0


def test_interrupt_on_a_terminal_stops_the_answer_and_not_the_conversation(
    edgert: Program, demo_model: Path
) -> None:
    options = ("--temperature", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--max-tokens", "400")
    with Terminal(edgert.command("chat", *options, "--threads", "1"), edgert.environment()) as terminal:
        terminal.until("> ")
        terminal.type("Tell me a story.\n")
        terminal.until("\r\n")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("> ")
        terminal.type("/exit\n")
        terminal.rest()
    assert terminal.process.returncode == 0
