"""A daemon killed while it makes edits: each is whole or absent, and goes on at the next start."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edit_requests import BEFORE, OTHER, QUICK, answer, store_of
from program import REPOSITORY, Program, wait_until

from edge_runtime.client import Client, Edit
from edge_runtime.daemon.runtime_file import read
from edge_runtime.errors import EdgeRuntimeError

KILLS = 8


@contextmanager
def killed(edgert: Program) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """A daemon that is killed at the end, and its client."""
    process = subprocess.Popen(
        edgert.command("serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=edgert.environment(),
        cwd=REPOSITORY,
    )
    try:
        wait_until(lambda: read(edgert.home) is not None)
        running = read(edgert.home)
        assert running is not None
        with Client(running.grpc) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def test_killed_at_any_moment_an_edit_is_whole_or_absent_and_goes_on(
    edgert: Program, demo_model: Path
) -> None:
    draw = random.Random(5)
    edgert.home.mkdir(parents=True)
    asked = 0
    for _ in range(KILLS):
        with killed(edgert) as (_, client):
            if all(edit.ended for edit in client.edits.list()):
                for request in (QUICK, OTHER):
                    with contextlib.suppress(EdgeRuntimeError):
                        client.edits.apply(*request.texts).close()
                        asked += 1
            time.sleep(draw.uniform(0, 3))
        check_whole(edgert)
    assert asked >= 2
    with killed(edgert) as (_, client):
        for edit in client.edits.list():
            with contextlib.suppress(EdgeRuntimeError):
                client.edits.follow(edit.name).result()
        edits = client.edits.list()
        assert all(edit.ended for edit in edits)
        assert answers_as_the_store_says(client, edits)
        for edit in edits:
            if edit.state == "applied":
                client.edits.revert(edit.name)
        assert answer(client) == BEFORE


def check_whole(edgert: Program) -> None:
    """What a killed daemon left: sound numbers, and changes for exactly what is applied."""
    store = store_of(edgert.home)
    store.check()
    for record in store.records():
        applied = record.state == "applied"
        assert applied == (record.id in store.applied(record.identity, solutions=True).solutions)
        assert bool(store.changes(record.id)) == (record.state in ("applied", "rejected", "reverted"))
        assert bool(record.report) == (record.state in ("applied", "rejected", "reverted"))


def answers_as_the_store_says(client: Client, edits: tuple[Edit, ...]) -> bool:
    """Whether an edit's target is told just where the edit is applied."""
    for request in (QUICK, OTHER):
        applied = any(e.state == "applied" and e.fact and e.fact.prompt == request.prompt for e in edits)
        if (answer(client, request.prompt) == request.target) != applied:
            return False
    return True


def test_killed_in_the_search_an_edit_goes_on_where_it_was(edgert: Program, demo_model: Path) -> None:
    edgert.home.mkdir(parents=True)
    with killed(edgert) as (process, client):
        making = client.edits.apply("The home of Paul Colton is in", "Paul Colton", "Marwick", steps=14)
        for moment in making:
            if moment.step == 9:  # its state is written down every two seconds
                process.kill()
                break
    assert store_of(edgert.home).get("edit-1").state == "running"
    with killed(edgert) as (_, client):
        steps = [moment.step for moment in client.edits.follow("edit-1") if moment.stage == "searching"]
        assert 1 < min(step for step in steps if step) <= 10
        assert client.edits.show("edit-1").state == "rejected"
