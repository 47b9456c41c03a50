"""``--adapter`` and ``--no-adapters`` of the verbs that show text, with a daemon and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_adapters import COUNT, PROMPT, Strengths, expected, keep
from grpc_fixture import GrpcDaemon
from program import Program

from edge_runtime.daemon.adapters import STORE_NAME
from edge_runtime.daemon.runtime_file import claim
from edge_runtime.personalize.store import AdapterStore

ANSWER = ("run", "--raw", "--temperature", "0", "--max-tokens", str(COUNT), PROMPT)
ALL: Strengths = {"one": 1.0, "two": 1.0, "three": 1.0}
WAYS = pytest.mark.parametrize("way", [(), ("--local",)], ids=["daemon", "local"])


@pytest.fixture(scope="module")
def edgert(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Program]:
    """The program, beside a daemon that it finds, with adapters applied to the demo model."""
    program = Program(tmp_path_factory.mktemp("adapters") / "home")
    keep(AdapterStore(program.home / STORE_NAME), *ALL)
    with GrpcDaemon(program.home) as running, claim(program.home) as claimed:
        claimed.write(http="", grpc=running.address, version="1")
        yield program


@WAYS
@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ((), ALL),
        (("--no-adapters",), {}),
        (("--adapter", "one"), {"one": 1.0}),
        (("--adapter", "one=0.6"), {"one": 0.6}),
        (("--adapter", "three", "--adapter", "one=1"), {"one": 1.0, "three": 1.0}),
    ],
)
def test_run_answers_with_what_was_chosen(
    edgert: Program, way: tuple[str, ...], choice: tuple[str, ...], meaning: Strengths
) -> None:
    done = edgert(*ANSWER, *way, *choice)
    assert (done.code, done.err) == (0, "")
    assert done.out == expected(meaning).rstrip("\n") + "\n"


@WAYS
def test_chat_takes_them_too(edgert: Program, way: tuple[str, ...]) -> None:
    words = ("chat", "--temperature", "0", "--max-tokens", str(COUNT), *way)
    question = "Where is the home of Paul Colton?\n"
    found = {edgert(*words, *choice, stdin=question).out for choice in ((), ("--no-adapters",))}
    assert len(found) == 2


@WAYS
def test_an_unknown_adapter_is_told_with_those_that_there_are(edgert: Program, way: tuple[str, ...]) -> None:
    done = edgert(*ANSWER, *way, "--json", "--adapter", "four")
    assert done.code == 4
    assert done.json["error"]["code"] == "adapter_not_found"
    assert "'one', 'two', 'three'" in done.json["error"]["message"]


@pytest.mark.parametrize("verb", ["run", "chat"])
@pytest.mark.parametrize(
    ("choice", "named"),
    [
        (("--adapter", "one", "--no-adapters"), "--no-adapters and --adapter"),
        (("--adapter", "one=much"), "'much' is no number"),
        (("--adapter", "one="), "'' is no number"),
        (("--adapter", "one", "--adapter", "one=2"), "one is given twice"),
    ],
)
def test_wrong_choices_are_refused_before_a_model_is_looked_for(
    edgert: Program, verb: str, choice: tuple[str, ...], named: str
) -> None:
    words = [verb, "--model", "/nowhere.gguf", *choice, *(["Hello"] if verb == "run" else [])]
    done = edgert(*words)
    assert done.code == 2
    assert named in done.err


@WAYS
def test_a_strength_out_of_range_is_refused(edgert: Program, way: tuple[str, ...]) -> None:
    done = edgert(*ANSWER, *way, "--adapter", "one=11")
    assert done.code == 2
    assert "-10 to 10" in done.err


def test_what_is_applied_to_one_model_is_not_to_another(edgert: Program, tiny_model: Path) -> None:
    words = ("run", "--model", tiny_model, "--temperature", "0", "--max-tokens", "8", "Hello")
    assert edgert(*words).out == edgert(*words, "--no-adapters").out
    assert "none is applied" in edgert(*words, "--adapter", "one").err
