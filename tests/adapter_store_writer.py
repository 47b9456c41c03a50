"""Writers of an adapter store, in processes of their own, for `test_personalize_store`.

``work PATH 0`` and ``work PATH 1``, once both are there, take edits from the queue until it is empty, and
solve each with those that stand.
``kill PATH COUNT SEED`` forks COUNT writers, kills each at a random moment, and checks the store after each.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import RequestError
from edge_runtime.personalize.store import AdapterStore, Solution

MODEL = "a" * 64


def change(scale: float, width: int = 6) -> LowRank:
    """A change all of whose numbers are `scale`."""
    return LowRank(
        "blk.1.ffn_down.weight",
        np.full((1, width), scale, np.float32),
        np.full((4, 1), scale, np.float32),
        scale,
    )


def solve(store: AdapterStore, number: int, report: Mapping[str, object], width: int = 6) -> None:
    """Apply an edit together with those that stand; the scale of each change says how many they are."""
    while True:
        standing = store.applied(MODEL)
        together = [*(record.id for record in standing.records), number]
        solved = {each: [change(len(together), width)] for each in together}
        keys = np.full((2, width), number, np.float32)
        solution = Solution(1, keys, np.zeros(2, np.int32), np.full((1, 4), number, np.float32))
        if store.finish(number, "applied", report, solution, solved, standing.revision):
            return


def work(path: Path, number: int) -> None:
    (path.parent / f"ready-{number}").touch()
    while not (path.parent / f"ready-{1 - number}").exists():
        time.sleep(0.002)
    store, done = AdapterStore(path), 0
    while queued := store.records(MODEL, ("queued",)):
        try:
            store.begin(queued[0].id)
        except RequestError:
            continue  # the other one was faster
        solve(store, queued[0].id, {})
        done += 1
        time.sleep(0.02)  # SQLite's lock is not fair; an edit's search gives others a chance as well
    print(done)


# --- killed writers ---------------------------------------------------------------------------

WIDTH = 20000  # an edit is then larger than a page of the database by far
CHANGED = {"applied": 1, "reverted": 2}  # state -> how often such a record has changed what is applied


def write(store: AdapterStore, promises: int) -> None:
    """Add, apply, reject, revert and remove edits without end; each is told once the store returned."""

    def promise(text: str) -> None:
        os.write(promises, f"{text}\n".encode())

    while True:
        number = store.add("edit", "demo", MODEL, {"n": 1}).id
        promise(f"queued {number}")
        store.begin(number)
        store.keep_progress(number, 1, bytes([number % 256]) * 50_000)
        promise(f"running {number}")
        if number % 5 == 0:
            store.finish(number, "rejected", {"whole": True}, None, {number: [change(-1, WIDTH)]})
            promise(f"rejected {number}")
            store.remove(number)
            promise(f"removed {number}")
            continue
        solve(store, number, {"whole": True}, WIDTH)
        promise(f"applied {number}")
        standing = store.applied(MODEL)
        if len(standing.records) > 6:
            oldest, *others = (record.id for record in standing.records)
            solved = {each: [change(len(others), WIDTH)] for each in others}
            store.revert(oldest, solved, standing.revision)
            promise(f"reverted {oldest}")


def check(store: AdapterStore, promised: Mapping[int, str], revision: int) -> None:
    """Every edit is whole or absent, and everything that was promised is there.

    Args:
        revision: how often records that were removed since have changed what is applied.
    """
    store.check()
    standing = store.applied(MODEL, solutions=True)
    n_standing = len(standing.records)
    for record in standing.records:
        (found,) = standing.changes[record.name]
        assert found.scale == n_standing, f"{record.name} was solved with {found.scale} of {n_standing}"
        assert (found.a == n_standing).all() and found.a.shape == (1, WIDTH)
        assert (found.b == n_standing).all()
        assert (standing.solutions[record.id].keys == record.id).all()
    states: dict[int, str] = {record.id: record.state for record in store.records()}
    for record in store.records():
        ended = record.state in ("applied", "rejected", "reverted")
        assert record.report == ({"whole": True} if ended else {}), record
        if record.state != "applied":  # those are read already
            assert bool(store.changes(record.id)) == ended, record
            assert (store.solution(record.id) is not None) == (record.state == "reverted"), record
        progress = store.progress(record.id)
        assert progress is None or progress == bytes([record.id % 256]) * 50_000, record
        assert progress is None or record.state == "running", record
    order = ["queued", "running", "rejected", "applied", "reverted", "removed"]
    for number, state in promised.items():
        now = states.get(number, "removed")
        assert order.index(now) >= order.index(state), f"{number} was promised {state}, is {now}"
        if state != "rejected" and not (now == "removed" and number % 5 == 0):
            assert now != "removed", f"{number} was {state} and is gone"
    revision += sum(CHANGED.get(state, 0) for state in states.values())
    assert standing.revision == revision, f"{standing.revision} after {revision} changes of what is applied"


def kill(path: Path, count: int, seed: int) -> None:
    store, chance = AdapterStore(path), random.Random(seed)
    n_promises, in_the_middle, revision = 0, 0, 0
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            write(store, writing)
        os.close(writing)
        time.sleep(chance.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL, f"the writer ended by itself, status {status}"
        with os.fdopen(reading) as pipe:
            lines = [line.split() for line in pipe]
        n_promises += len(lines)
        in_the_middle += bool(lines) and lines[-1][0] in ("queued", "running", "rejected")
        check(store, {int(number): state for state, number in lines}, revision)
        for record in store.records():  # what the dead one left
            if record.state == "running":
                store.fail(record.id, "its process was killed")
            if record.state != "applied":
                store.remove(record.id)
                revision += CHANGED.get(record.state, 0)
    print(count, n_promises, in_the_middle)


if __name__ == "__main__":
    what, database, *rest = sys.argv[1:]
    if what == "work":
        work(Path(database), int(rest[0]))
    else:
        kill(Path(database), *map(int, rest))
