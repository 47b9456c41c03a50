"""A real gRPC server inside the test's process, on an event loop of its own; for both clients' tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.config import Config, ModelConfig
from edge_runtime.daemon.grpc_server import GrpcServer
from edge_runtime.daemon.service import Service
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.model_store.store import ModelStore

Value = TypeVar("Value")
Stub = Any

# Nearly every token alike: with this seed an answer goes on until the context is full.
RAMBLING: Mapping[str, Any] = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 2}


def config_of(**sections: Mapping[str, Any]) -> Config:
    """Settings for the demo model on one thread; keywords are sections and what differs in them."""
    config = Config(model=ModelConfig(threads=1, sequences=2))
    return replace(
        config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()}
    )


class GrpcDaemon:
    """Service and gRPC server, started; leave it as a context manager to stop both.

    Attributes:
        shutdowns: how often Daemon.Shutdown was called.
    """

    def __init__(
        self,
        home: Path,
        config: Config | None = None,
        *,
        credentials: grpc.ServerCredentials | None = None,
        address: str = "127.0.0.1:0",
        stall_seconds: float = 60.0,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.config = config or config_of()
        self.home = home
        self.shutdowns = 0
        self.tokens = TokenStore(home / "state.db")
        self.gate = Gate(self.tokens, require_token=self.config.server.require_token)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="daemon under test", daemon=True)
        self._thread.start()

        async def start() -> None:
            self.service = Service(self.config, store=ModelStore(home))
            await self.service.start()
            self.server = GrpcServer(
                self.service,
                self.gate,
                address=address,
                shut_down=self._count_shutdown,
                credentials=credentials,
                stall_seconds=stall_seconds,
            )
            await self.server.start()

        self.run(start())

    def _count_shutdown(self) -> None:
        self.shutdowns += 1

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"127.0.0.1:{self.server.port}"

    def run(self, coroutine: Coroutine[Any, Any, Value], timeout: float = 60) -> Value:
        """Run a coroutine on the daemon's event loop and wait for its outcome."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def call(self, function: Callable[[], Value]) -> Value:
        """Call a function on the daemon's event loop, as what belongs to it may be touched nowhere else."""

        async def wrapped() -> Value:
            return function()

        return self.run(wrapped())

    def token(self, name: str, *scopes: Scope) -> str:
        """A new token, which is known at once."""
        token = self.tokens.create(name, scopes or (Scope.INFER,))
        self.gate.reload()
        return token

    def finished(self, outcome: str) -> int:
        """How many requests ended like this."""
        return self.call(self.service.status).finished.get(outcome, 0)

    def tasks(self) -> int:
        """Tasks of the daemon's loop, without the one that counts."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return self.run(count())

    def stop(self, seconds: float = 1.0) -> None:
        """Stop all of it."""

        async def stop() -> None:
            self.server.announce_stop()
            await self.service.stop(seconds)
            await self.server.stop()

        try:
            self.run(stop())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    def __enter__(self) -> GrpcDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
