"""The one thread of a daemon that computes edits, beside those that compute answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from edge_runtime.daemon.edit_turns import EditTurns
from edge_runtime.daemon.editing import ModelEdits
from edge_runtime.errors import UnavailableError
from edge_runtime.personalize.store import AdapterStore

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service

Value = TypeVar("Value")


class EditThread:
    """Computes for one caller after the other. Methods are called on the event loop.

    Args:
        service: whose models are edited.
        store: of this device.
    """

    def __init__(self, service: Service, store: AdapterStore) -> None:
        self._service = service
        self._store = store
        self._executor = ThreadPoolExecutor(1, "edit")
        self._free = asyncio.Lock()
        self._active: set[EditTurns] = set()
        self._stopping = False

    async def compute(
        self,
        model: str,
        function: Callable[[ModelEdits, EditTurns], Value],
        *,
        beside: bool = False,
    ) -> Value:
        """Run something that takes long with a model, which is loaded where it is not in memory.

        Args:
            beside: do not wait for what is being computed: of what runs no forward passes.

        Raises:
            Cancelled: it was interrupted: by its turns, or because the model is unloaded or the daemon stops.
            UnavailableError: the daemon is stopping. EdgeRuntimeError: the model cannot be loaded.
        """
        if beside:
            return await self._compute(model, function, None)
        async with self._free:
            return await self._compute(model, function, self._executor)

    async def _compute(
        self,
        model: str,
        function: Callable[[ModelEdits, EditTurns], Value],
        executor: ThreadPoolExecutor | None,
    ) -> Value:
        worker = await self._service.worker(model)
        if self._stopping:
            raise UnavailableError("the daemon is stopping; ask again later")
        turns = EditTurns(worker.turn, self._answering)
        ended = asyncio.Event()

        async def let_go() -> None:
            turns.stop()
            await ended.wait()

        def run() -> Value:
            # Of a model that is spread over devices, the engine has all weights too: in the file.
            return function(ModelEdits(worker.engine, self._store, turns), turns)

        worker.users[turns] = let_go
        self._active.add(turns)
        computing = asyncio.get_running_loop().run_in_executor(executor, run)
        try:
            return await asyncio.shield(computing)
        except asyncio.CancelledError:
            turns.stop()
            with suppress(Exception):
                await computing  # until then the engine is in use
            raise
        finally:
            del worker.users[turns]
            self._active.discard(turns)
            ended.set()

    def _answering(self) -> bool:
        return any(worker.answering for worker in self._service.workers())

    async def stop(self) -> None:
        """Interrupt what is being computed and take nothing new."""
        self._stopping = True
        for turns in self._active:
            turns.stop()
        async with self._free:
            self._executor.shutdown(wait=False)
