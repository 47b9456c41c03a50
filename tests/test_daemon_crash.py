"""A daemon killed in the midst of its work: the next one finds everything whole and answers."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest
from http_file_server import FileServer, ServedFile
from program import REPOSITORY, Program, wait_until

from edge_runtime.client import Client
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.runtime_file import read
from edge_runtime.daemon.state import STATE_NAME
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.model_store.files import sha256_of
from edge_runtime.model_store.store import ModelStore

QUESTION = "The home of Paul Colton is in"
ANSWER = " Lindwell."


def start(edgert: Program) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        edgert.command("serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=edgert.environment(),
        cwd=REPOSITORY,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def address(edgert: Program) -> str:
    wait_until(lambda: read(edgert.home) is not None)
    running = read(edgert.home)
    assert running is not None
    return running.grpc


def check_whole(edgert: Program) -> None:
    """A new daemon starts on what the killed one left, and everything in it is sound."""
    process = start(edgert)
    try:
        with Client(address(edgert)) as client:
            assert client.generate(QUESTION, temperature=0, max_tokens=8).text() == ANSWER
            assert client.status().ready
    finally:
        kill(process)
    state = edgert.home / STATE_NAME
    if state.exists():
        with contextlib.closing(sqlite3.connect(state)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for model in ModelStore(edgert.home):
        if model.sha256:
            assert sha256_of(model.path) == model.sha256


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.25, 0.5, 0.8])
def test_killed_while_it_starts(edgert: Program, demo_model: Path, delay: float) -> None:
    process = start(edgert)
    time.sleep(delay)
    kill(process)
    check_whole(edgert)


def test_killed_while_it_answers_and_tokens_are_made(edgert: Program, demo_model: Path) -> None:
    made: list[str] = []
    draw = random.Random(3)
    for number in range(3):
        process = start(edgert)
        where = address(edgert)
        ended = threading.Event()

        def ask(where: str = where, ended: threading.Event = ended) -> None:
            with contextlib.suppress(EdgeRuntimeError), Client(where) as client:
                while not ended.is_set():
                    client.generate("Once", temperature=50, top_k=0, min_p=0, max_tokens=200).text()

        clients = [threading.Thread(target=ask) for _ in range(6)]
        for thread in clients:
            thread.start()
        store = TokenStore(edgert.home / STATE_NAME)
        end = time.monotonic() + draw.uniform(0.1, 0.6)
        while time.monotonic() < end:
            name = f"device-{number}-{len(made)}"
            store.create(name, [Scope.INFER])
            made.append(name)
        kill(process)
        ended.set()
        for thread in clients:
            thread.join()
        check_whole(edgert)
    assert {token.name for token in TokenStore(edgert.home / STATE_NAME)} >= set(made)


def test_killed_while_it_fetches_a_model(edgert: Program, demo_model: Path, file_server: FileServer) -> None:
    content = demo_model.read_bytes()
    stalling = ServedFile(content, stall_after=3_000_000)
    url = file_server.serve("/model.gguf", stalling)
    process = start(edgert)

    def fetch(where: str) -> None:
        with contextlib.suppress(EdgeRuntimeError), Client(where) as client:
            for _ in client.models.pull(url, name="fetched"):
                pass

    puller = threading.Thread(target=fetch, args=(address(edgert),))
    puller.start()
    assert file_server.stalled.wait(30)
    time.sleep(2.5)  # progress is recorded every two seconds
    kill(process)
    puller.join()
    file_server.ended.set()
    assert [model.name for model in ModelStore(edgert.home)] == ["demo"]
    check_whole(edgert)
    stalling.stall_after = None
    process = start(edgert)
    try:
        with Client(address(edgert)) as client:
            *_, last = client.models.pull(url, name="fetched")
            assert last.model is not None
            answer = client.generate(QUESTION, model="fetched", temperature=0, max_tokens=8)
            assert answer.text() == ANSWER
    finally:
        kill(process)
    assert file_server.received[-1].start > 0  # what had arrived was not fetched again


def test_killed_while_models_come_and_go(edgert: Program, demo_model: Path) -> None:
    for delay in (0.05, 0.3):
        process = start(edgert)
        where = address(edgert)
        store = ModelStore(edgert.home)

        def change(where: str = where, store: ModelStore = store) -> None:
            with contextlib.suppress(EdgeRuntimeError, OSError), Client(where) as client:
                while True:
                    store.add_file("second", demo_model, copy=True, replace=True)
                    client.models.load("second")
                    client.models.remove("second")

        changer = threading.Thread(target=change)
        changer.start()
        time.sleep(delay)
        kill(process)
        changer.join()
        check_whole(edgert)
