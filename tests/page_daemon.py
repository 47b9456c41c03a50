"""A daemon on a thread, and answers that a daemon could give, for the status page's tests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, Substitute, find_chromium

from edge_runtime.cluster.report import (
    ClusterReport,
    LayerReport,
    MemberReport,
    NodeShare,
    PartitionReport,
)
from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.config import Config, ModelConfig, ServerConfig
from edge_runtime.daemon.http_app import build_app
from edge_runtime.daemon.http_server import HttpServer
from edge_runtime.daemon.service import Service
from edge_runtime.daemon.status import LoadedModel, RequestState, RequestStatus, Status
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.model_store.store import ModelStore

JSON = {"Content-Type": "application/json"}
EVENTS = {"Content-Type": "text/event-stream"}
SHOWN = "document.querySelector('#version').textContent.length > 1"  # a dash before


@contextmanager
def launched(folder: Path) -> Iterator[Browser]:
    """A browser; without one on this machine the test is skipped."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed; Debian's package is chromium-headless-shell")
    started = Browser(executable, folder)
    yield started
    started.close()


class RunningDaemon:
    """A daemon on an event loop of its own.

    Attributes:
        url: of its page, with a slash at the end.
    """

    def __init__(self, home: Path, *, require_token: bool = False, **model: Any) -> None:
        self._tokens = TokenStore(home / "state.db")
        self._gate = Gate(self._tokens, require_token=require_token)
        self._config = Config(
            server=ServerConfig(require_token=require_token), model=ModelConfig(threads=1, **model)
        )
        self._store = ModelStore(home)
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._port: Future[int] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        try:
            self._service = Service(self._config, store=self._store)
            await self._service.start()
            server = HttpServer(build_app(self._service, self._gate))
            self._port.set_result(await server.start("127.0.0.1", 0))
        except BaseException as error:
            self._port.set_exception(error)
            raise
        await self._ended.wait()
        await self._service.stop(0.0)
        await server.stop(0.0)

    def __enter__(self) -> RunningDaemon:
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._port.result(60)}/"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    def finished(self, outcome: str) -> int:
        """How many requests ended so."""
        return self._service.metrics.finished_counts().get(outcome, 0)

    def create_token(self, name: str, scope: Scope) -> str:
        """A new token that the daemon knows."""
        token = self._tokens.create(name, [scope])
        self._gate.reload()
        return token


def busy_status(**changes: Any) -> Status:
    """A daemon in the midst of work."""
    model = LoadedModel("demo", 2_700_000, "Q8_0", 512, 4, 1, 6_100_000, 16_800_000)
    states: tuple[RequestState, ...] = ("decode", "prefill", "queued")
    requests = tuple(
        RequestStatus(f"request-{i}", "kitchen", "demo", state, 12, 7 * i, 0.5)
        for i, state in enumerate(states)
    )
    status = Status(
        version="1.2.3",
        pid=1,
        started=0.0,
        ready=True,
        reason="",
        stopping=False,
        default_model="demo",
        models=(model,),
        requests=requests,
        queue_limit=32,
        finished={"stop": 41, "cancelled": 2, "context_overflow": 1},
        prompt_tokens=1000,
        generated_tokens=2000,
        speed=tuple(range(120)),
        memory_bytes=94_300_000,
        memory_available_bytes=2_900_000_000,
        temperature=51.26,
        cpu_percent=38.2,
    )
    return replace(status, **changes)


def partition(**changes: Any) -> PartitionReport:
    """A model on two devices of three."""
    found = PartitionReport(
        model="demo",
        plan=3,
        reason="2 of 3 devices are used: the link to phone (38 ms) costs more than its share saves",
        mode="relaxed",
        quality=0.99,
        calibrated=True,
        transport="udp",
        round_trips=2,
        predicted_seconds=0.0102,
        measured_seconds=0.0114,
        alone_seconds=None,
        nodes=(
            NodeShare("desk", 90, 0.625, 3, 4_200_000, 3e9),
            NodeShare("shelf", 54, 0.375, 0, 2_100_000, 2e9, 0.0021, 0.0005, 0.02, 2, 900, 870, 31),
            NodeShare("phone", 0, 0.0, 0, 0, 1e9, 0.038, 0.004, 0.1),
        ),
        layers=tuple(LayerReport(0.0011, 0.0002 * place, 0.002, (15, 9, 0)) for place in range(6)),
        syncs=(1, 6),
        on_time=812.5,
        late=(31.0, 4.5, 0.0),
        lost=2.0,
        recomputed=1.0,
        tokens=150,
    )
    return replace(found, **changes)


def cluster(*models: PartitionReport, **changes: Any) -> ClusterReport:
    """Three members, one of which is gone."""
    members = (
        MemberReport("desk", "192.0.2.1:8422", "here", "", "0.1.0", "x86_64", 1 << 30, 4),
        MemberReport(
            "shelf", "192.0.2.2:8422", "works", "", "0.1.0", "aarch64", 1 << 29, 4, 61.2, None, 0.0021
        ),
        MemberReport("phone", "192.0.2.3:8422", "gone", "nothing listens at 192.0.2.3:8422"),
    )
    report = ClusterReport("desk", True, "ab" * 32, "192.0.2.1:8422", members, models or (partition(),))
    return replace(report, **changes)


def hostile_cluster(text: str) -> Any:
    """A cluster in which every text is this one, and most numbers are large."""
    member = MemberReport(text, text, "expelled", text, text, text, 10**15, 10**6, 1e6, 1e6, 1e6)
    node = NodeShare(text, 10**6, 0.3, 10**6, 10**15, 1e15, 1e6, 1e6, 1.0, 4, 10**12, 10**12, 10**12)
    layers = (LayerReport(1e6, 1e6, 1e6, (1, 2, 3)),) * 80
    model = partition(model=text, reason=text, transport=text, nodes=(node,) * 9, layers=layers, on_time=1e15)
    return cluster(model, model, name=text, fingerprint=text, address=text, members=(member,) * 9)


def told(status: Status) -> Substitute:
    """The daemon says this about itself."""
    return Substitute("/api/status$", 200, json.dumps(status.as_json()), JSON)


def refusal(path: str, status: int, code: str, message: str, **headers: str) -> Substitute:
    """The daemon refuses, in its own form."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return Substitute(path, status, json.dumps({"error": error}), {**JSON, **headers})


def streamed(path: str, *events: object, end: str = "data: [DONE]\n\n") -> Substitute:
    """A whole stream of events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return Substitute(path, 200, body + end, EVENTS)


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    """An event of a chat's stream."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


@contextmanager
def opened(page: Page, daemon: RunningDaemon, *substitutes: Substitute) -> Iterator[Page]:
    """The page with these answers instead of the daemon's; nothing may go wrong on it."""
    if substitutes:
        page.substitute(*substitutes)
    page.open(daemon.url)
    page.wait(SHOWN)
    yield page
    assert page.problems == []
