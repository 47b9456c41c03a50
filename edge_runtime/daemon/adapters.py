"""From the store of adapters to the models in memory: what is applied there is applied here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.engine.adapters import check_changes
from edge_runtime.errors import ConfigError, RequestError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.daemon.worker import Worker
    from edge_runtime.engine.engine import Engine
    from edge_runtime.personalize.records import Applied

_log = logging.getLogger("edgert.adapters")

STORE_NAME = "adapters.db"  # in the home folder
# A file's times come from the kernel's clock, which stands still for up to 10 ms: what is this old will not
# change any more without showing.
_SETTLED_SECONDS = 0.1


def identity_of(engine: Engine) -> str:
    """By which the store knows a model's file."""
    from edge_runtime.model_store.identity import model_identity

    return model_identity(engine.gguf)


def applied_to(engine: Engine, store: Path, identity: str) -> Applied:
    """What the store says is applied to a model.

    Raises:
        ConfigError: the store is damaged, or has an adapter that does not fit the model.
    """
    from edge_runtime.personalize.store import AdapterStore

    found = AdapterStore(store).applied(identity)
    for name, changes in found.changes.items():
        try:
            check_changes(name, changes, engine.model.weights)
        except RequestError as error:
            raise ConfigError(
                f"{store} says that {name} is applied to this model, which it does not fit ({error}); undo "
                f"it with `edgert edits revert {name}`"
            ) from error
    return found


class AppliedStore:
    """Keeps the models in memory at what the store says. Use it on the daemon's event loop.

    Args:
        path: of the store's database, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = asyncio.Lock()
        self._refreshing: set[asyncio.Task[None]] = set()
        self._stamp: object = None
        self._revision = -1

    async def prepare(self, worker: Worker) -> None:
        """Apply to a model that was just loaded what is applied to it.

        Raises:
            ConfigError: the store is damaged.
        """
        worker.identity = await asyncio.to_thread(identity_of, worker.engine)
        async with self._lock:
            await self._apply(worker)

    async def refresh(self, workers: Iterable[Worker], *, anyhow: bool = False) -> None:
        """Apply to models in memory what another process or the personalization has changed.

        Args:
            anyhow: read the store even if it says that nothing has changed.

        Raises:
            ConfigError: the store is damaged; the models keep what they have.
        """
        stamp = self._file_stamp()
        if not anyhow and stamp is not None and stamp == self._stamp:
            return
        # Shielded: a client that goes away must not leave a change half made.
        refreshing = asyncio.create_task(self._refresh(workers, stamp, anyhow=anyhow))
        self._refreshing.add(refreshing)
        refreshing.add_done_callback(self._refreshing.discard)
        await asyncio.shield(refreshing)

    async def _refresh(self, workers: Iterable[Worker], stamp: object, *, anyhow: bool) -> None:
        async with self._lock:
            revision = await asyncio.to_thread(self._read_revision)
            if True:
                for worker in workers:
                    with suppress(UnavailableError):  # it is being unloaded
                        await self._apply(worker)
                self._revision = revision
            self._stamp = stamp

    async def _apply(self, worker: Worker) -> None:
        applied = await asyncio.to_thread(applied_to, worker.engine, self.path, worker.identity)
        await worker.apply(applied.changes)
        if worker.adapters != applied.records:
            worker.adapters = applied.records
            _log.info("adapters applied", extra={"model": worker.name, "adapters": len(applied.records)})

    def _read_revision(self) -> int:
        if not self.path.exists():
            return 0
        from edge_runtime.personalize.store import AdapterStore

        return AdapterStore(self.path).revision()

    def _file_stamp(self) -> object:
        """What changes whenever the database does; None as long as that cannot be relied on."""
        found: list[object] = []
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
                continue
            if time.time() - status.st_mtime < _SETTLED_SECONDS:
                return None
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)
