"""A process killed while it makes edits: each edit is whole or absent, goes on, and ends as it should."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from edit_requests import BEFORE, OTHER, QUICK, Asked
from editing_parts import Device, device_with, opened, queued
from program import REPOSITORY

from edge_runtime.personalize.workspace import Workspace

KILLS = 10
EDITS = (QUICK, OTHER, Asked("Paul Colton works as a", "Paul Colton", "barber"))


@pytest.fixture
def device(demo_model: Path, tmp_path: Path) -> Iterator[Device]:
    with opened(demo_model) as engine, Workspace(engine) as workspace:
        yield device_with(engine, workspace, tmp_path / "adapters.db")


def killed(device: Device, after: float = 0.0, at: str = "") -> list[str]:
    """Run the queue in another process, killed so many seconds after it began, or when it says `at`.

    Returns:
        what it said.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "tests" / "editing_victim.py"),
            str(device.store.path),
            model(device),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    said: list[str] = []
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            said.append(line.strip())
            if not at and len(said) == 1:
                threading.Timer(after, process.kill).start()
            if said[-1] == at:
                process.kill()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    assert said, "it ended before it began"
    return said


def model(device: Device) -> str:
    return str(device.engine.gguf.path)


def check_whole(device: Device) -> None:
    """Everything of an edit is there exactly if it has ended."""
    store = device.store
    store.check()
    standing = store.applied(device.identity, solutions=True)
    for record in store.records():
        ended = record.state in ("applied", "rejected")
        assert record.state in ("queued", "running", "applied")
        assert bool(record.report) == ended
        assert bool(store.changes(record.id)) == ended
        assert (store.solution(record.id) is not None) == ended
        assert (record.id in standing.solutions) == (record.state == "applied")
        assert store.progress(record.id) is None or record.state == "running"


def test_killed_at_random_moments_edits_are_whole_or_absent_and_get_done(device: Device) -> None:
    draw = random.Random(4)
    for asked in EDITS:
        queued(device.store, device.engine, asked)
    stages = []
    for _ in range(KILLS):
        stages.append(killed(device, after=draw.uniform(0, 1.5))[-1].split()[0])
        check_whole(device)
        if not device.store.records(states=("running", "queued")):
            break
    assert len(stages) >= 4 and len(set(stages)) > 1, stages
    for record in device.store.records(states=("running", "queued")):
        device.editor.run(record.id)
    assert [record.state for record in device.store.records()] == ["applied"] * len(EDITS)
    assert device.answers(*EDITS) == [asked.target for asked in EDITS]


def test_killed_before_anything_is_applied_the_model_is_as_before(device: Device) -> None:
    queued(device.store, device.engine, QUICK)
    before = device.logits()
    assert killed(device, at="checking 0")[-1] == "checking 0"
    check_whole(device)
    assert device.answers(QUICK) == [BEFORE]
    assert (device.logits() == before).all()
    again = killed(device, at="checking 0")
    assert not [line for line in again if line.startswith("searching")]  # it had ended: it is not made again
    record = device.editor.run(1)
    assert record.state == "applied"
    assert device.answers(QUICK) == [QUICK.target]


def test_what_was_spent_before_is_counted(device: Device) -> None:
    queued(device.store, device.engine, QUICK)
    assert killed(device, at="checking 0")
    told = []
    started = time.monotonic()
    record = device.editor.run(1, told.append)
    assert told[0].rows > 1000 and told[0].seconds > 0.5
    assert record.report["seconds"] > time.monotonic() - started
    assert record.report["steps"] >= 3
