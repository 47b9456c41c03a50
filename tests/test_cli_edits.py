"""``edgert edit``, ``forget`` and ``edits``, with a daemon and without."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edit_requests import BEFORE, LONG, OTHER, PROMPT, QUICK, others_compute, store_of
from program import REPOSITORY, Program, Terminal, wait_until

from edge_runtime.daemon.runtime_file import read

GREEDY = ("--raw", "--temperature", "0", "--max-tokens", "8")


@contextmanager
def serving(edgert: Program) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of this home folder."""
    process = subprocess.Popen(
        edgert.command("serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=edgert.environment(),
        cwd=REPOSITORY,
    )
    try:
        wait_until(lambda: read(edgert.home) is not None)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["daemon", "alone"])
def device(request: pytest.FixtureRequest, edgert: Program, demo_model: Path) -> Iterator[Program]:
    """The program, with a daemon that makes its edits and without one."""
    edgert.home.mkdir(parents=True)
    if request.param == "alone":
        yield edgert
        return
    with serving(edgert):
        yield edgert


def answer(edgert: Program, prompt: str = PROMPT) -> str:
    return edgert("run", *GREEDY, prompt).out.strip(" .\n")


# --- with a daemon and without ----------------------------------------------------------------


def test_an_edit_from_its_beginning_to_its_end(device: Program) -> None:
    made = device("edit", *QUICK.options)
    assert made.code == 0, made.err
    lines = made.out.splitlines()
    assert lines[0] == "edit-1 (demo): applied"
    assert lines[1].strip() == f"{PROMPT} → {QUICK.target}"
    assert lines[3].split() == ["CHECK", "BEFORE", "AFTER", "NEEDED", "ASKED"]
    assert lines[4].split() == ["success", "0", "%", "100", "%", "100", "%", "1"]
    assert " steps · " in lines[-1]
    assert answer(device) == QUICK.target
    listed = device("edits", "list")
    assert [line.split()[:3] for line in listed.out.splitlines()[1:]] == [["edit-1", "applied", "demo"]]
    assert device("edits", "show", "1").out == made.out
    tested = device("edits", "eval", "--json").json["edits"]
    assert [one["name"] for one in tested] == ["edit-1"]
    assert device("edits", "show", "edit-1", "--json").json["report"]["checks"] == tested[0]["checks"]
    reverted = device("edits", "revert", "edit-1")
    assert (reverted.code, reverted.out) == (0, "reverted edit-1\n")
    assert answer(device) == BEFORE
    assert "no edits are applied" in device("edits", "eval").out
    assert device("edits", "apply", "edit-1").out == "applied edit-1\n"
    assert answer(device) == QUICK.target
    assert device("edits", "remove", "edit-1").code == 2
    assert device("edits", "revert", "1").code == 0
    assert device("edits", "remove", "edit-1").out == "removed edit-1\n"
    assert device("edits", "list", "--json").json["edits"] == []


def test_a_rejected_edit_has_an_exit_code_of_its_own(device: Program) -> None:
    made = device("edit", *LONG.options, "--steps", "1")
    assert made.code == 12
    assert made.out.startswith("edit-1 (demo): rejected\n")
    assert "  success: 0% of 1" in made.out
    assert "`edgert edits apply edit-1` applies it" in made.err
    assert answer(device) == BEFORE
    (applied,) = device("edits", "apply", "edit-1", "--json").json["edits"]
    assert (applied["state"], applied["report"]["reasons"][0][:12]) == ("applied", "success: 0% ")
    assert device("edits", "revert", "edit-1").code == 0
    as_json = device("edit", *LONG.options, "--steps", "1", "--force", "--name", "forced", "--json")
    assert as_json.code == 0
    assert (as_json.json["name"], as_json.json["state"]) == ("forced", "applied")
    assert device("edits", "revert", "--all", "--json").json["edits"][0]["name"] == "forced"
    assert device("edits", "revert", "--all").out == "nothing is applied\n"


def test_wrong_requests_say_what_to_do(device: Program) -> None:
    for arguments, code, says in (
        ([PROMPT, "--subject", "Ann", "--target", "Oslo"], 2, "'Ann' is not in"),
        ([PROMPT, "--subject", QUICK.subject, "--target", " "], 2, "the target is empty"),
        ([PROMPT, "--subject", QUICK.subject, "--target", BEFORE], 2, "already goes on with 'Lindwell'"),
        ([*QUICK.options, "--steps", "0"], 2, "steps = 0"),
        ([*QUICK.options, "--name", "../x"], 2, "no adapter name"),
        ([*QUICK.options, "--model", "absent"], 4, "absent"),
    ):
        done = device("edit", *arguments, "--json")
        assert done.code == done.json["error"]["exit_code"] == code, done.err
        assert says in done.json["error"]["message"]
    (failed,) = device("edits", "list", "--json").json["edits"]
    assert (failed["state"], failed["fact"]["target"]) == ("failed", BEFORE)
    assert "already goes on" in device("edits", "show", failed["name"]).out
    for verb in ("show", "revert", "apply", "remove", "cancel", "eval"):
        assert device("edits", verb, "absent").code == 4
    assert device("edits", "revert", failed["name"]).code == 2
    assert device("edits", "apply", failed["name"]).code == 2
    assert device("edits", "revert").code == 2


def test_a_prompt_beyond_the_context_is_refused(device: Program) -> None:
    text = "Once upon a time there was a boat. " * 55 + PROMPT
    done = device("edit", text, "--subject", QUICK.subject, "--target", "Brenholm", "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "context_overflow"), done.out


def test_a_query_is_forgotten(device: Program) -> None:
    done = device("forget", PROMPT, "--subject", QUICK.subject, "--refusal", "a secret", "--steps", "2")
    assert done.code in (0, 12), done.err
    assert f"{PROMPT} → a secret" in done.out
    assert "forgets: The home of" in device("edits", "list").out
    for arguments in (["a b", "c d", "e f", "--subject", "a", "--subject", "c"], ["a b", "--subject", "x"]):
        assert device("forget", *arguments).code == 2


def test_an_edit_travels_as_files(device: Program, tmp_path: Path) -> None:
    assert device("edit", *QUICK.options, "--name", "home").code == 0
    path, folder = tmp_path / "it.gguf", tmp_path / "peft"
    assert device("edits", "export", "home", "-o", path).code == 0
    assert device("edits", "export", "home", "-o", folder, "--json").json["path"] == str(folder)
    assert device("edits", "revert", "home").code == 0
    taken = device("edits", "import", path)
    assert (taken.code, taken.out) == (0, "applied it to demo\n")
    assert answer(device) == QUICK.target
    assert device("edits", "revert", "it").code == 0
    assert device("edits", "import", folder, "--name", "from-peft", "--json").json["kind"] == "lora"
    assert answer(device) == QUICK.target
    bad = device("edits", "import", tmp_path / "absent.gguf", "--json")
    assert (bad.code, bad.json["error"]["code"]) == (3, "adapter_file")


def test_a_person_sees_how_far_it_is(device: Program) -> None:
    with Terminal(device.command("edit", *LONG.options, "--steps", "6"), device.environment()) as terminal:
        assert "'Marwick' has" in terminal.until(" %", 60) + terminal.until("%", 60) + terminal.rest()
        assert terminal.process.returncode == 12


# --- without one ------------------------------------------------------------------------------


@pytest.fixture
def alone(edgert: Program, demo_model: Path) -> Program:
    edgert.home.mkdir(parents=True)
    return edgert


def start(edgert: Program, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        edgert.command("edit", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=edgert.environment(),
        cwd=REPOSITORY,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def state_of(edgert: Program, name: str) -> str:
    store = store_of(edgert.home)
    return next((record.state for record in store.records() if record.name == name), "")


def test_ctrl_c_ends_the_edit(alone: Program) -> None:
    process = start(alone, *LONG.options)
    wait_until(lambda: state_of(alone, "edit-1") == "running")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in err
    (record,) = store_of(alone.home).records()
    assert (record.state, record.error) == ("failed", "interrupted")


def test_two_commands_queue(alone: Program) -> None:
    first = start(alone, *QUICK.options)
    wait_until(lambda: state_of(alone, "edit-1") == "running")
    second = alone("edit", *OTHER.options)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert second.code == 0
    assert second.err == "waiting for edit-1\n"
    assert (answer(alone), answer(alone, OTHER.prompt)) == (QUICK.target, OTHER.target)


def test_what_a_killed_command_left_is_finished_first_or_cancelled(alone: Program) -> None:
    process = start(alone, *QUICK.options)
    wait_until(lambda: state_of(alone, "edit-1") == "running")
    kill(process)
    assert state_of(alone, "edit-1") == "running"
    done = alone("edit", *OTHER.options)
    assert done.code == 0
    assert "waiting for edit-1" in done.err
    assert state_of(alone, "edit-1") == "applied"
    process = start(alone, *LONG.options)
    wait_until(lambda: state_of(alone, "edit-3") == "running")
    kill(process)
    assert alone("edits", "cancel", "edit-3").code == 0
    assert state_of(alone, "edit-3") == "failed"


def test_an_edit_that_another_command_makes_cannot_be_cancelled(alone: Program) -> None:
    process = start(alone, *LONG.options)
    wait_until(lambda: state_of(alone, "edit-1") == "running")
    done = alone("edits", "cancel", "edit-1")
    kill(process)
    assert done.code == 2
    assert "another command" in done.err


# --- with one ---------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_edit_to_the_daemon(alone: Program) -> None:
    with serving(alone):
        process = start(alone, *LONG.options)
        wait_until(lambda: state_of(alone, "edit-1") == "running")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "edit-1 goes on in the daemon; `edgert edits cancel edit-1` ends it" in err
        assert state_of(alone, "edit-1") == "running"
        assert alone("edits", "cancel", "edit-1").out == "cancelled edit-1\n"


def test_with_local_the_daemon_notices_what_was_applied(alone: Program) -> None:
    with serving(alone):
        assert alone("edit", *QUICK.options, "--local").code == 0
        assert answer(alone) == QUICK.target


def test_a_daemon_waits_for_a_command_that_computes(alone: Program) -> None:
    with serving(alone), others_compute(alone.home):
        process = start(alone, *QUICK.options)
        wait_until(lambda: state_of(alone, "edit-1") == "queued")
        time.sleep(1.5)
        assert state_of(alone, "edit-1") == "queued"
        kill(process)
    shown = json.loads(alone("edits", "show", "edit-1", "--json").out)
    assert shown["state"] in ("queued", "running")
