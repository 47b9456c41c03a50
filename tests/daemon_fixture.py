"""A real daemon inside the test's process: service and HTTP server on an event loop of their own."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from program import REPOSITORY
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.config import Config, ModelConfig, SchedulingConfig, ServerConfig
from edge_runtime.daemon.http_app import build_app
from edge_runtime.daemon.http_boundary import Boundary
from edge_runtime.daemon.http_server import HttpServer
from edge_runtime.daemon.service import Service
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.model_store.store import ModelStore

DEMO_MODEL = REPOSITORY / "models" / "demo" / "edge-demo-q8_0.gguf"
Value = TypeVar("Value")

COMPLETE = "/v1/completions"
# A prompt after which the random model does not happen to end its answer for a thousand tokens.
PROMPT = [18, 19, 20]
LONG = {"prompt": PROMPT, "max_tokens": 4000, "temperature": 0}


def small_config(**settings: Any) -> Config:
    """Settings for the demo model on one thread; keywords replace those of any section."""
    config = Config(model=ModelConfig(threads=1, sequences=2, context=256))
    sections = {}
    for name, kind in (("server", ServerConfig), ("model", ModelConfig), ("scheduling", SchedulingConfig)):
        section = getattr(config, name)
        own = {key: value for key, value in settings.items() if key in kind.__dataclass_fields__}
        sections[name] = replace(section, **own)
    unknown = set(settings) - {key for part in sections.values() for key in part.__dataclass_fields__}
    assert not unknown, f"no such settings: {unknown}"
    return replace(config, **sections)


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="daemon under test", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Value], timeout: float = 60) -> Value:
        """Run a coroutine on it and wait for its outcome."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def call(self, function: Callable[[], Value]) -> Value:
        """Call a function on it, as what belongs to the loop may be touched nowhere else."""

        async def wrapped() -> Value:
            return function()

        return self.run(wrapped())

    def close(self) -> None:
        """Stop it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class RunningDaemon:
    """Service and HTTP server, started; leave it as a context manager to stop both.

    Args:
        home: folder of the models and of the tokens.
        config: its settings; addresses are not used, every port is a free one.
        ssl_context: to speak TLS with.
    """

    def __init__(
        self,
        home: Path,
        config: Config | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.config = config or small_config()
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self.tokens = TokenStore(home / "state.db")
        self.gate = Gate(self.tokens, require_token=self.config.server.require_token)
        self.thread = LoopThread()
        self.host = host
        self.scheme = "https" if ssl_context else "http"
        self.service, self.server, self.port = self.thread.run(self._start(ssl_context))

    async def _start(self, ssl_context: ssl.SSLContext | None) -> tuple[Service, HttpServer, int]:
        service = Service(self.config, store=ModelStore(self.home))
        await service.start()
        server = HttpServer(build_app(service, self.gate))
        return service, server, await server.start(self.host, 0, ssl_context)

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"{self.scheme}://{self.host}:{self.port}"

    def token(self, name: str, *scopes: Scope) -> str:
        """A new token that is known at once."""
        token = self.tokens.create(name, scopes or (Scope.INFER,))
        self.gate.reload()
        return token

    def stop(self) -> None:
        """Stop all of it."""

        async def stop() -> None:
            await self.server.stop(1.0)
            await self.service.stop(1.0)

        try:
            self.thread.run(stop())
        finally:
            self.thread.close()

    def __enter__(self) -> RunningDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Served:
    """An application of one path behind the boundary, on a real socket."""

    def __init__(self, endpoint: Any) -> None:
        app = Starlette(routes=[Route("/", endpoint, methods=["GET"])], middleware=[Middleware(Boundary)])
        self.thread = LoopThread()
        self.server = HttpServer(app)
        self.port = self.thread.run(self.server.start("127.0.0.1", 0))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.run(self.server.stop(0.1))
        self.thread.close()


def until(condition: Callable[[], Any], seconds: float = 5.0) -> float:
    """Wait until something is so; returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came to be"
        time.sleep(0.002)
    return time.monotonic() - began


def running(daemon: RunningDaemon) -> int:
    return len(daemon.thread.call(daemon.service.status).requests)


def finished(daemon: RunningDaemon) -> dict[str, int]:
    return daemon.thread.call(daemon.service.status).finished


def request_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content))}
    fields = "".join(f"{name}: {value}\r\n" for name, value in (lines | headers).items())
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode() + content


def connect(daemon: RunningDaemon) -> socket.socket:
    return socket.create_connection((daemon.host, daemon.port), timeout=10)
