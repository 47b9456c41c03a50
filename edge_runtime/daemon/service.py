"""The daemon's core, which both APIs call. It knows models and requests, and no wire format."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from edge_runtime import __version__
from edge_runtime.daemon.adapters import STORE_NAME, AppliedStore
from edge_runtime.daemon.answer import Answer, deadline_error
from edge_runtime.daemon.cluster import Cluster
from edge_runtime.daemon.config import Config
from edge_runtime.daemon.device import read_device
from edge_runtime.daemon.loaded_models import LoadedModels
from edge_runtime.daemon.metrics import Metrics
from edge_runtime.daemon.personalization import Personalization
from edge_runtime.daemon.pulling import PullProgress, pull_stream
from edge_runtime.daemon.requests import Embeddings, GenerationRequest, Usage
from edge_runtime.daemon.status import LoadedModel, Status
from edge_runtime.daemon.token_rate import TokenRate
from edge_runtime.daemon.worker import Worker
from edge_runtime.engine.embedding import embed
from edge_runtime.errors import EdgeRuntimeError, RequestError, UnavailableError
from edge_runtime.model_store.pull import PullOptions
from edge_runtime.model_store.store import ModelStore, StoredModel
from edge_runtime.model_store.summary import ModelSummary, summarize

_log = logging.getLogger("edgert.service")
_MAX_INPUTS = 256  # texts in one request for embeddings

Value = TypeVar("Value")


class Service:
    """What the APIs call; every coroutine runs on the daemon's event loop.

    Call `start` before anything else and `stop` at the end.
    """

    def __init__(
        self, config: Config, *, store: ModelStore | None = None, cluster: Cluster | None = None
    ) -> None:
        self.config = config
        self.store = store or ModelStore()
        self.cluster = cluster
        self.adapters = AppliedStore(self.store.home / STORE_NAME)
        self.personalization = Personalization(self)
        self.metrics = Metrics()
        self.started = time.time()
        self._rate = TokenRate()
        self._stopping = False
        self._preparing = ThreadPoolExecutor(1, "prepare")  # templates and tokenizing, off the event loop
        self._prober: asyncio.Task[None] | None = None
        self._trouble = "no token has been produced yet"

    async def start(self) -> None:
        """Load the default model, if it is to be preloaded.

        Raises:
            EdgeRuntimeError: it cannot be loaded.
        """
        self._models = LoadedModels(self.config, self.store, self.adapters, self, self.cluster)
        try:
            if self.cluster is not None:
                await self.cluster.start()
            if self.config.model.preload:
                await self._probe(await self._models.get())
        except BaseException:
            await self._models.close(0)
            if self.cluster is not None:
                await self.cluster.stop()
            raise
        self._prober = asyncio.create_task(self._keep_probing())
        await self.personalization.start()

    async def stop(self, seconds: float) -> None:
        """Refuse what is new, let what runs finish for so long, cancel the rest, free the models."""
        self._stopping = True
        if self._prober is not None:
            self._prober.cancel()
            with suppress(asyncio.CancelledError):
                await self._prober
        await self.personalization.stop()
        await self._models.close(seconds)
        if self.cluster is not None:
            await self.cluster.stop()
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def reload_cluster(self) -> None:
        """Take part in a cluster that this device has joined since, or no longer in one that it has left.

        Raises:
            EdgeRuntimeError: it cannot.
        """
        if self.cluster is None:
            return
        before = self.cluster.active
        await self.cluster.reload()
        if self.cluster.active != before:
            await self._models.reload()

    async def refresh_adapters(self) -> None:
        """Read the store of adapters again; what it says is applied is in force from the next answers on.

        Answers in progress end with the adapters that they began with.

        Raises:
            ConfigError: the store is damaged; the models keep what they have.
        """
        await self.adapters.refresh(self._models, anyhow=True)

    def hurry(self) -> None:
        """Let a `stop` in progress wait no longer."""
        for worker in self._models:
            worker.hurry()

    # --- text ---------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Answer:
        """Queue a request for text.

        Raises:
            OverloadedError: the queue is full. ModelNotFoundError: there is no such model.
            RequestError, ContextOverflowError, ChatTemplateError: the request cannot be served.
            AdapterNotFoundError: it asks for an adapter that is not applied.
            UnavailableError: the daemon is stopping.
        """
        worker = await self.worker(request.model)
        await self.adapters.refresh(self._models)
        engine = worker.engine
        if request.messages is not None:
            messages = request.messages
            tokens = await self._prepare(lambda: engine.chat_tokens(messages))
        elif isinstance(request.prompt, str):
            text = request.prompt
            tokens = await self._prepare(lambda: engine.tokenizer.encode(text))
        else:
            tokens = list(request.prompt or ())
        decoding = engine.decoding(
            tokens,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
            logprobs=request.logprobs,
            adapters=None if request.adapters is None else dict(request.adapters),
        )
        if worker.partition is not None:
            decoding.forwarding = worker.partition.contributions(request.mode, request.quality)
        return worker.submit(decoding, request.client, request.timeout)

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        client: str = "",
        timeout: float | None = None,
    ) -> Embeddings:
        """A vector for each input, text or token ids.

        Raises:
            RequestError: no inputs or too many. ContextOverflowError: one is too long.
            DeadlineError: the time is over.
        """
        if not 1 <= len(inputs) <= _MAX_INPUTS:
            raise RequestError(f"{len(inputs)} inputs; possible are 1 to {_MAX_INPUTS}")
        worker = await self.worker(model)
        engine = worker.engine

        def encode() -> list[list[int]]:
            return [engine.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in inputs]

        tokens = await self._prepare(encode)
        for one in tokens:
            engine.check_prompt(one, room=0)
        limit = self.config.scheduling.request_seconds
        seconds = limit if timeout is None else min(timeout, limit)
        vectors = []
        try:
            async with asyncio.timeout(seconds):
                for one in tokens:
                    vectors.append((await worker.call(partial(embed, engine, one))).tolist())
        except TimeoutError:
            raise deadline_error(seconds, 0) from None
        return Embeddings(vectors, sum(map(len, tokens)))

    async def tokenize(
        self, text: str, *, model: str = "", add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The tokens of a text."""
        tokenizer = (await self.worker(model)).engine.tokenizer
        return await self._prepare(
            lambda: tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
        )

    async def detokenize(self, tokens: Sequence[int], *, model: str = "") -> str:
        """The text of tokens.

        Raises:
            RequestError: a number that is no token.
        """
        tokenizer = (await self.worker(model)).engine.tokenizer
        return await self._prepare(lambda: tokenizer.decode(tokens))

    async def token_bytes(self, tokens: Sequence[int], *, model: str = "") -> list[bytes]:
        """What each token stands for.

        Raises:
            RequestError: a number that is no token.
        """
        tokenizer = (await self.worker(model)).engine.tokenizer
        return await self._prepare(lambda: [tokenizer.token_bytes(token, special=True) for token in tokens])

    async def _prepare(self, function: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function)

    async def worker(self, model: str) -> Worker:
        """The worker of a model, which is loaded first where it is not in memory; empty for the default one.

        Raises:
            UnavailableError: the daemon is stopping. EdgeRuntimeError: as `LoadedModels.get`.
        """
        if self._stopping:
            raise UnavailableError("the daemon is stopping; ask again later")
        return await self._models.get(model)

    def workers(self) -> list[Worker]:
        """Those of the models in memory; from any thread."""
        return list(self._models)

    # --- models -------------------------------------------------------------------------------

    @property
    def default_model(self) -> str:
        """Name of the model for requests that name none."""
        return self._models.default

    def models(self) -> list[StoredModel]:
        """All models of the store, and the default one where it is a file outside."""
        found = list(self.store)
        if self._models.default not in {model.name for model in found}:
            with suppress(EdgeRuntimeError):
                outside = self.store.resolve(self.config.model.default)
                found.insert(0, StoredModel(self._models.default, outside.path, outside.source, "", 0.0))
        return found

    def loaded(self) -> list[LoadedModel]:
        """Models in memory."""
        return [self._models.describe(worker) for worker in self._models]

    def _stored(self, name: str) -> StoredModel:
        wanted = name or self._models.default
        for model in self.models():
            if model.name == wanted:
                return model
        return self.store.get(wanted)

    async def describe(self, name: str) -> ModelSummary:
        """A model's file at a glance.

        Raises:
            ModelNotFoundError: there is none. ModelFileError: it is damaged.
        """
        path = self._stored(name).path
        return await asyncio.to_thread(summarize, path)

    def model_path(self, name: str) -> Path:
        """Where a model's file is.

        Raises:
            ModelNotFoundError: there is none.
        """
        return self._stored(name).path

    async def load(self, name: str) -> LoadedModel:
        """Bring a model into memory.

        Raises:
            ModelNotFoundError, ModelFileError, OutOfMemoryError, OverloadedError.
        """
        return self._models.describe(await self.worker(name))

    async def unload(self, name: str) -> None:
        """Free a model once its requests are done; nothing happens where it is not in memory."""
        await self._models.unload(name or self._models.default)

    async def remove(self, name: str) -> None:
        """Unload a model and delete it from the store.

        Raises:
            ModelNotFoundError: there is none. RequestError: the demo model.
        """
        self.store.check_removable(name)
        await self._models.unload(name)
        await asyncio.to_thread(self.store.remove, name)
        _log.info("model removed", extra={"model": name})

    def pull(self, source: str, options: PullOptions) -> AsyncIterator[PullProgress]:
        """Fetch a model into the store; the last item has the model.

        Raises (while iterating):
            DownloadError, ModelFileError, RequestError.
        """
        return pull_stream(self.store, source, options)

    # --- state --------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a token was really produced lately and more will be taken."""
        return not self._stopping and not self._unready()

    def _unready(self) -> str:
        """Why the daemon is not ready; empty where it is."""
        if self._stopping:
            return "the daemon is stopping"
        age = time.monotonic() - self._rate.last
        if age <= self.config.scheduling.ready_seconds:
            return ""
        return self._trouble or f"no token has been produced for {age:.0f} s"

    def status(self) -> Status:
        """The daemon at this moment."""
        device = read_device()
        reason = self._unready()
        return Status(
            version=__version__,
            pid=os.getpid(),
            started=self.started,
            ready=not reason,
            reason=reason,
            stopping=self._stopping,
            default_model=self._models.default,
            models=tuple(self.loaded()),
            requests=tuple(request for worker in self._models for request in worker.requests()),
            queue_limit=self.config.scheduling.queue,
            finished=self.metrics.finished_counts(),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            speed=self._rate.history(),
            memory_bytes=device.memory_bytes,
            memory_available_bytes=device.memory_available_bytes,
            temperature=device.temperature,
            cpu_percent=device.cpu_percent,
            cluster=self.cluster.report() if self.cluster is not None else None,
            adapters=tuple(
                {"model": worker.name, "name": record.name, "kind": record.kind}
                for worker in self._models
                for record in worker.adapters
            ),
        )

    @property
    def heartbeat(self) -> float:
        """Seconds since the slowest engine thread last showed that it is alive."""
        now = time.monotonic()
        return max((now - worker.beat for worker in self._models), default=0.0)

    _prompt_tokens = 0
    _generated_tokens = 0

    def tokens(self, count: int) -> None:
        """A worker generated so many tokens just now."""
        self._rate.add(count)
        self._generated_tokens += count
        self.metrics.tokens(count)

    def finished(self, outcome: str, usage: Usage | None) -> None:
        """A worker's request has ended."""
        if usage is not None:
            self._prompt_tokens += usage.prompt_tokens
        self.metrics.finished(outcome, usage)

    async def _keep_probing(self) -> None:
        """While nobody asks for anything, compute a token now and then: /readyz tells what is, not hopes."""
        pause = self.config.scheduling.ready_seconds / 3
        while True:
            await asyncio.sleep(pause)
            if time.monotonic() - self._rate.last < pause:
                continue
            for worker in self._models:
                if not worker.answering:
                    await self._probe(worker)
                    break

    async def _probe(self, worker: Worker) -> None:
        try:
            await worker.call(worker.engine.probe)
        except Exception as error:
            self._trouble = f"the model {worker.name!r} produces no token ({type(error).__name__})"
            _log.exception("the probe of a model failed", extra={"model": worker.name})
        else:
            self._trouble = ""
            self._rate.touch()
