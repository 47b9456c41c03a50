"""Answers and edits take turns, and answers get most of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from grpc_fixture import RAMBLING, GrpcDaemon
from program import wait_until

from edge_runtime.client import Client
from edge_runtime.daemon.edit_turns import SHARE, EditTurns
from edge_runtime.daemon.editing import ModelEdits
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.personalize.progress import Cancelled
from edge_runtime.personalize.workspace import Workspace

PASSES = 150


@pytest.fixture
def daemon(tmp_path: Path, demo_model: Path) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path / "home") as running:
        yield running


def passes(daemon: GrpcDaemon, count: int) -> int:
    """Compute so many passes of one token each as an edit does; returns the tokens generated meanwhile."""
    before = 0

    def compute(edits: ModelEdits, turns: EditTurns) -> int:
        nonlocal before
        engine: Engine = daemon.call(lambda: daemon.service.workers()[0].engine)
        with Workspace(engine, turn=turns) as workspace:
            before = daemon.call(daemon.service.status).generated_tokens
            for _ in range(count):
                workspace.clear()
                workspace.forward(Batch(np.array([5], np.int32), np.array([0], np.int32)))
        return turns.passes

    made = daemon.run(daemon.service.personalization._thread.compute("", compute))
    assert made == count
    return daemon.call(daemon.service.status).generated_tokens - before


def test_an_edit_gets_at_most_its_share_while_answers_are_computed(daemon: GrpcDaemon) -> None:
    ended = threading.Event()

    def ask() -> None:
        with Client(daemon.address) as client:
            while not ended.is_set():
                client.generate("Once", max_tokens=400, **RAMBLING).text()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: daemon.call(daemon.service.status).generated_tokens > 20)
        tokens = passes(daemon, PASSES)
    finally:
        ended.set()
        thread.join()
    # A pass of the edit and one of the answer are alike: one token each. Between two of its own passes the
    # engine's thread also hands the token on, so of the time it is left it needs a part for that.
    share = PASSES / (PASSES + tokens)
    assert 0.1 < share < SHARE + 0.1, f"{PASSES} passes of the edit, {tokens} of the answer"


def test_alone_an_edit_does_not_wait() -> None:
    turns = EditTurns(threading.Lock(), lambda: False)
    began = time.monotonic()
    with turns():
        time.sleep(0.2)
    with turns():
        pass
    assert time.monotonic() - began < 0.4
    assert turns.passes == 2


def test_an_edit_goes_on_as_soon_as_nobody_asks_any_more() -> None:
    asking = [True]
    turns = EditTurns(threading.Lock(), lambda: asking[0])
    with turns():
        time.sleep(0.3)
    threading.Timer(0.05, lambda: asking.__setitem__(0, False)).start()
    began = time.monotonic()
    with turns():
        assert time.monotonic() - began < 0.3, "it would have had to wait for twice as long as its pass"


def test_while_answers_are_computed_a_pass_is_followed_by_twice_its_time() -> None:
    turns = EditTurns(threading.Lock(), lambda: True)
    with turns():
        time.sleep(0.1)
    began = time.monotonic()
    with turns():
        assert time.monotonic() - began == pytest.approx(0.2, abs=0.03)


def test_what_is_stopped_gets_no_further_turn() -> None:
    lock = threading.Lock()
    turns = EditTurns(lock, lambda: True)
    with turns():
        time.sleep(0.5)
    threading.Timer(0.05, turns.stop).start()
    began = time.monotonic()
    with pytest.raises(Cancelled), turns():
        pass
    assert time.monotonic() - began < 0.5, "not even one that it waits for"
    assert not lock.locked()
    assert turns.passes == 1
