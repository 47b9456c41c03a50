"""Which models are in memory, each with its worker."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from edge_runtime.daemon.adapters import AppliedStore
from edge_runtime.daemon.cluster import Cluster
from edge_runtime.daemon.config import Config
from edge_runtime.daemon.status import LoadedModel
from edge_runtime.daemon.worker import Observer, Worker
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.gguf import GGML_TYPES
from edge_runtime.errors import EdgeRuntimeError, OverloadedError, UnavailableError
from edge_runtime.model_store.store import ModelStore

_log = logging.getLogger("edgert.models")
_DRAIN_SECONDS = 600.0


class LoadedModels:
    """Loads models when they are asked for, and lets the one unused the longest give way."""

    def __init__(
        self,
        config: Config,
        store: ModelStore,
        adapters: AppliedStore,
        observer: Observer,
        cluster: Cluster | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._adapters = adapters
        self._observer = observer
        self._cluster = cluster
        self._workers: dict[str, Worker] = {}
        self._changing = asyncio.Lock()
        self._turn = threading.Lock()
        self._stopping = False
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def default(self) -> str:
        """Name under which the default model is known."""
        text = self._config.model.default
        return Path(text).stem if self._is_path(text) else text

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    async def get(self, name: str = "") -> Worker:
        """The worker of a model, which is loaded first where it is not in memory.

        Raises:
            ModelNotFoundError: the store has no such model.
            ModelFileError, OutOfMemoryError: it cannot be loaded.
            ConfigError: the store of adapters is damaged.
            OverloadedError: all models in memory are busy.
        """
        name = name or self.default
        worker = self._workers.get(name)
        if worker is None:
            async with self._changing:
                worker = self._workers.get(name) or await self._load(name)
        return worker

    async def _load(self, name: str) -> Worker:
        if self._stopping:
            raise UnavailableError("the daemon is stopping; ask again later")
        path = self._path(name)
        await self._make_room()
        settings = self._config.model
        options = EngineOptions(
            threads=settings.threads or None,
            context=settings.context or None,
            sequences=settings.sequences,
            weights=settings.weights,
            kv_type=settings.kv_type,
        )
        started = time.monotonic()
        worker = await self._spread(name, path, options)
        if worker is None:
            engine = await asyncio.to_thread(Engine.load, path, options)
            worker = Worker(name, engine, self._config.scheduling, self._observer, self._turn)
        try:
            await self._adapters.prepare(worker)
        except BaseException:
            await worker.close(0)
            raise
        self._workers[name] = worker
        seconds = time.monotonic() - started
        _log.info("model loaded", extra={"model": name, "seconds": round(seconds, 2)})
        return worker

    async def _spread(self, name: str, path: Path, options: EngineOptions) -> Worker | None:
        """The worker of a model that other devices compute too; None where it is better off alone."""
        cluster = self._cluster
        if cluster is None or not cluster.active:
            return None
        engine = await asyncio.to_thread(Engine.load, path, replace(options, ffn=False, head=False))
        worker = Worker(name, engine, self._config.scheduling, self._observer, self._turn)
        worker.before_freeing = partial(cluster.release, name)
        try:
            between_tokens = partial(worker.call, takes_place=False)
            worker.partition = await cluster.spread(name, engine, between_tokens)
        except EdgeRuntimeError as error:
            _log.warning("the model %s is not spread over the cluster: %s", name, error)
            await worker.close(0)
            return None
        except BaseException:
            await worker.close(0)
            raise
        return worker

    def _path(self, name: str) -> Path:
        # Only the configuration may name a file: a client chooses among the store's models.
        if name == self.default and self._is_path(self._config.model.default):
            return self._store.resolve(self._config.model.default).path
        return self._store.get(name).path

    @staticmethod
    def _is_path(text: str) -> bool:
        return "/" in text or text.endswith(".gguf")

    async def _make_room(self) -> None:
        while len(self._workers) >= self._config.model.max_loaded:
            idle = [worker for worker in self._workers.values() if not worker.busy]
            if not idle:
                names = ", ".join(self._workers)
                raise OverloadedError(
                    f"the models in memory ({names}) are all busy and no more than "
                    f"{self._config.model.max_loaded} fit; try again",
                    retry_after=5.0,
                )
            await self._close(min(idle, key=lambda worker: worker.used), 0.0)

    async def unload(self, name: str) -> bool:
        """Free a model once its requests are done; whether it was in memory."""
        async with self._changing:
            worker = self._workers.get(name)
            if worker is None:
                return False
            await self._close(worker, _DRAIN_SECONDS)
            return True

    async def reload(self) -> None:
        """Load what is in memory anew, each once its requests are done: alone or spread, as it is now."""
        for name in [worker.name for worker in self]:
            if await self.unload(name):
                await self.get(name)

    async def _close(self, worker: Worker, seconds: float) -> None:
        del self._workers[worker.name]
        # Shielded: a client that goes away while it waits must not leave an engine that nobody stops.
        closing = asyncio.create_task(worker.close(seconds))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)
        _log.info("model unloaded", extra={"model": worker.name})

    async def close(self, seconds: float) -> None:
        """Free all models; what runs may finish for so long."""
        self._stopping = True
        async with self._changing:
            await asyncio.gather(*self._closing, *(worker.close(seconds) for worker in self))
            self._workers.clear()

    def describe(self, worker: Worker) -> LoadedModel:
        """A model in memory, in figures."""
        engine = worker.engine
        weights = engine.model.weights
        sizes: Counter[str] = Counter()
        parameters = 0
        for tensor in map(weights.record, weights.names):
            count = 1
            for extent in tensor.shape:
                count *= extent
            parameters += count
            sizes[GGML_TYPES[tensor.type].name.upper()] += count
        return LoadedModel(
            name=worker.name,
            parameters=parameters,
            quantization=sizes.most_common(1)[0][0],
            context=engine.context,
            sequences=len(engine.places),
            threads=engine.threads,
            weight_bytes=weights.repacked_bytes + weights.mapped_bytes,
            kv_bytes=engine.model.kv_bytes,
        )
