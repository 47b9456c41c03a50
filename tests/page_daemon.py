"""A daemon on a thread, and answers that a daemon could give, for the status page's tests."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from browser import Substitute

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
