"""A real daemon inside the test's process: service and HTTP server on an event loop of their own."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from program import REPOSITORY

from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.config import Config, ModelConfig, SchedulingConfig, ServerConfig
from edge_runtime.daemon.http_app import build_app
from edge_runtime.daemon.http_server import HttpServer
from edge_runtime.daemon.service import Service
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.model_store.store import ModelStore

DEMO_MODEL = REPOSITORY / "models" / "demo" / "edge-demo-q8_0.gguf"
Value = TypeVar("Value")


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
        prepare: called with the started service on its event loop, before the HTTP server.
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
