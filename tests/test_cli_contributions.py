"""``--mode`` and ``--quality`` of the verbs that show text, and what they tell of other devices' part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_fixture import GrpcDaemon
from program import Program
from spread_answer import COUNTS, answers_with

from edge_runtime.cli.answer import contributions_text
from edge_runtime.client import ContributionCounts
from edge_runtime.daemon.runtime_file import claim

GREEDY = ("--temperature", "0", "--max-tokens", "12")
QUESTION = "Where does Paul Colton live?"


@pytest.fixture(scope="module")
def edgert(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Program:
    """The program, beside a daemon that it finds."""
    return Program(tmp_path_factory.mktemp("contributions") / "home")


@pytest.fixture(scope="module")
def daemon(edgert: Program) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(edgert.home) as running, claim(edgert.home) as claimed:
        claimed.write(http="", grpc=running.address, version="1")
        yield running


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (ContributionCounts(879.0, (100.0, 20.0), 1.0, 0.0, False), "12 % late, 0.1 % lost"),
        (ContributionCounts(90.0, (), 0.0, 10.0, False), "10 % recomputed"),
        (ContributionCounts(1e6, (1.0,), 0.0, 0.0, False), "under 0.1 % late"),
        (ContributionCounts(0.0, (0.0,), 5.0, 0.0, False), "100 % lost"),
        (
            ContributionCounts(98.0, (2.0,), 0.0, 0.0, True),
            "2.0 % late, went on exactly at the quality's bound",
        ),
        (ContributionCounts(23.0, (0.0, 0.0), 0.0, 0.0, False), "all on time"),
        (ContributionCounts(0.0, (), 0.0, 0.0, False), "all on time"),
    ],
)
def test_what_became_of_contributions_is_told_in_shares(counts: ContributionCounts, text: str) -> None:
    assert contributions_text(counts) == text


def test_a_daemon_without_a_cluster_takes_them_and_tells_of_no_contributions(
    edgert: Program, daemon: GrpcDaemon
) -> None:
    plain = edgert("run", *GREEDY, QUESTION)
    done = edgert("run", "--verbose", "--mode", "relaxed", "--quality", "0.95", *GREEDY, QUESTION)
    assert done.code == 0, done.err
    assert done.out == plain.out
    assert "answered by the daemon" in done.err
    assert "contributions" not in done.err and "--mode" not in done.err
    answer = edgert("run", "--json", "--mode", "exact", *GREEDY, QUESTION).json
    assert "contributions" not in answer


def test_they_reach_the_daemon_and_the_counts_come_back(
    edgert: Program, daemon: GrpcDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers_with(COUNTS, daemon.service, monkeypatch)
    wishes = ("--mode", "relaxed", "--quality", "0.97")
    shares = "contributions 12 % late, 0.2 % lost, 0.8 % recomputed, went on exactly at the quality's bound"
    run = edgert("run", "--verbose", *wishes, QUESTION)
    assert run.out == "Lindwell.\n" and shares in run.err
    chat = edgert("chat", "--verbose", *wishes, stdin=f"{QUESTION}\n{QUESTION}\n")
    assert chat.err.count(shares) == 2
    assert edgert("run", "--json", "--mode", "exact", QUESTION).json["contributions"] == {
        "on_time": 87.0,
        "late": [9.5, 2.5],
        "lost": 0.25,
        "recomputed": 0.75,
        "fell_back": True,
    }
    assert edgert("run", "--raw", QUESTION).code == 0
    found = [(request.mode, request.quality) for request in asked]
    assert found == [("relaxed", 0.97)] * 3 + [("exact", None), ("", None)]


@pytest.mark.parametrize("verb", ["run", "chat"])
@pytest.mark.parametrize("wishes", [("--mode", "relaxed"), ("--quality", "0.9")])
def test_without_a_daemon_they_are_said_to_change_nothing(
    edgert: Program, daemon: GrpcDaemon, verb: str, wishes: tuple[str, str]
) -> None:
    words = [verb, "--local", *GREEDY, *([QUESTION] if verb == "run" else [])]
    done = edgert(*words, *wishes, stdin=f"{QUESTION}\n")
    assert done.code == 0
    assert (
        done.err == "--mode and --quality change nothing: no daemon is asked, and one device alone is exact\n"
    )
    plain = edgert(*words, stdin=f"{QUESTION}\n")
    assert (plain.out, plain.err) == (done.out, "")


@pytest.mark.parametrize("local", [(), ("--local",)])
@pytest.mark.parametrize("quality", ["0", "1.01", "nan", "-1"])
def test_a_quality_out_of_range_is_named(
    edgert: Program, daemon: GrpcDaemon, local: tuple[str, ...], quality: str
) -> None:
    done = edgert("run", "--json", *local, "--quality", quality, QUESTION)
    assert done.code == 2
    assert done.json["error"]["code"] == "invalid_request"
    assert "quality" in done.json["error"]["message"]


def test_a_mode_that_there_is_not_is_named(edgert: Program) -> None:
    done = edgert("chat", "--mode", "fast")
    assert done.code == 2
    assert "'exact', 'relaxed'" in done.err
