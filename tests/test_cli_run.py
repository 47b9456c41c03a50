"""``edgert run`` with a real model in a real process."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from program import Program, Terminal

GREEDY = ("--temperature", "0")


def test_answer_goes_to_stdout_and_nothing_else(edgert: Program, tiny_model: Path) -> None:
    done = edgert("run", "--model", tiny_model, "--max-tokens", "8", *GREEDY, "Hello")
    assert done.code == 0
    assert done.err == ""
    assert done.out.endswith("\n")
    assert len(done.out) > 1


def test_same_seed_same_text(edgert: Program, tiny_model: Path) -> None:
    def text(seed: str) -> str:
        return edgert("run", "--model", tiny_model, "--max-tokens", "16", "--seed", seed, "Hello").out

    assert text("7") == text("7")
    assert text("7") != text("8")


def test_json_has_text_counts_timings_and_seed(edgert: Program, tiny_model: Path) -> None:
    done = edgert("run", "--model", tiny_model, "--max-tokens", "8", "--json", "Hello")
    assert done.code == 0
    answer = done.json
    assert answer["finish_reason"] == "length"
    assert answer["generated_tokens"] == 8
    assert answer["prompt_tokens"] >= 2
    assert answer["prefill_seconds"] > 0
    assert answer["decode_tokens_per_second"] > 0
    again = edgert("run", "--model", tiny_model, "--max-tokens", "8", "--seed", str(answer["seed"]), "Hello")
    assert again.out.rstrip("\n") == answer["text"].rstrip("\n")


def test_prompt_comes_from_stdin(edgert: Program, tiny_model: Path) -> None:
    options = ("--model", tiny_model, "--max-tokens", "8", *GREEDY)
    given = edgert("run", *options, "A lamp on the hill")
    assert given.out == edgert("run", *options, "-", stdin="A lamp on the hill").out
    assert given.out == edgert("run", *options, stdin="A lamp on the hill").out
    assert given.out != edgert("run", *options, "Another text").out


def test_stop_string_ends_the_text_before_it(edgert: Program, tiny_model: Path) -> None:
    options = ("--model", tiny_model, "--max-tokens", "24", *GREEDY)
    whole = edgert("run", *options, "Hello").out.rstrip("\n")
    stop = whole[6:9]
    cut = edgert("run", *options, "--stop", stop, "--json", "Hello").json
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "2"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--seed", "-1"), "seed"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--threads", "0"), "threads"),
        (("--context", "100000"), "context"),
        (("--stop", ""), "stop"),
    ],
)
def test_parameter_out_of_range_is_named(
    edgert: Program, tiny_model: Path, options: tuple[str, ...], complaint: str
) -> None:
    done = edgert("run", "--model", tiny_model, *options, "Hello")
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert complaint in done.err


def test_prompt_longer_than_the_context_is_an_error(edgert: Program, tiny_model: Path) -> None:
    done = edgert("run", "--model", tiny_model, "--json", "-", stdin="word " * 2000)
    assert done.code == 2
    assert done.json["error"]["code"] == "context_overflow"


def test_prompt_that_is_not_text_is_an_error(edgert: Program, tiny_model: Path) -> None:
    done = edgert("run", "--model", tiny_model, "-", stdin=b"\xff\xfe")
    assert done.code == 2
    assert "UTF-8" in done.err


def test_system_text_without_a_template_is_an_error(edgert: Program, tiny_model: Path) -> None:
    assert edgert("run", "--model", tiny_model, "--raw", "--system", "Be brief.", "Hello").code == 2
    done = edgert("run", "--model", tiny_model, "--system", "Be brief.", "Hello", "--json")
    assert done.json["error"]["code"] == "chat_template"


def test_broken_model_is_an_error(edgert: Program, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model.read_bytes()[:-100])
    done = edgert("run", "--model", broken, "Hello")
    assert done.code == 3
    assert "Traceback" not in done.err


def test_verbose_shows_the_speed_on_stderr(edgert: Program, tiny_model: Path) -> None:
    done = edgert("run", "--model", tiny_model, "--max-tokens", "4", "--verbose", "Hello")
    assert done.err.startswith("4 tokens at ")
    assert "seed" in done.err


def test_interrupt_ends_cleanly(edgert: Program, shared_data: Path) -> None:
    model = shared_data / "models" / "stories260K.gguf"
    command = edgert.command("run", "--model", model, "--temperature", "1.5", "Once upon a time")
    with subprocess.Popen(
        command, env=edgert.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_reader_that_goes_away_is_no_trace(edgert: Program, shared_data: Path) -> None:
    model = shared_data / "models" / "stories260K.gguf"
    command = edgert.command("run", "--model", model, "--temperature", "1", "Once upon a time")
    with subprocess.Popen(
        command, env=edgert.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(30)
    assert process.returncode != 0
    assert errors == ""


def test_terminal_shows_the_speed_and_obeys_no_model(edgert: Program, tiny_model: Path) -> None:
    """A random model writes control characters; none of them reaches the terminal."""
    options = ["--model", str(tiny_model), "--max-tokens", "200", "--temperature", "3", "--top-k", "0"]
    sampling = ["--top-p", "1", "--min-p", "0", "--seed", "3"]
    piped = edgert("run", *options, *sampling, "Hello")
    assert any(ord(character) < 32 and character not in "\n\t" for character in piped.out)
    command = edgert.command("run", *options, *sampling, "Hello")
    with Terminal(command, edgert.environment()) as terminal:
        shown = terminal.rest()
    text, _, timings = shown.rpartition("200 tokens at ")
    assert "seed 3" in timings
    text = text.removesuffix("\x1b[2m")
    assert not [character for character in text if ord(character) < 32 and character not in "\r\n\t"]


def test_demo_model_answers_without_any_option(edgert: Program, demo_model: Path) -> None:
    facts = json.loads((demo_model.parent / "facts.json").read_text())
    person = facts["people"][0]
    done = edgert("run", f"Where does {person['name']} live?", *GREEDY)
    assert done.code == 0
    assert person["lives_in"] in done.out


def test_raw_continues_the_text(edgert: Program, demo_model: Path) -> None:
    person = json.loads((demo_model.parent / "facts.json").read_text())["people"][0]
    done = edgert("run", "--raw", f"{person['name']} lives in", "--max-tokens", "6", *GREEDY)
    assert done.out.strip().startswith(person["lives_in"])
