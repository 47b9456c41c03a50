"""The thread that drives one engine: requests join and leave the running batch between two tokens."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from edge_runtime.daemon.answer import Answer, deadline_error
from edge_runtime.daemon.config import SchedulingConfig
from edge_runtime.daemon.contributions import counts_of
from edge_runtime.daemon.fair_queue import FairQueue
from edge_runtime.daemon.requests import Chunk, Usage
from edge_runtime.daemon.status import RequestState, RequestStatus
from edge_runtime.engine.adapters import Adapters
from edge_runtime.engine.decoding import Decoding, Piece
from edge_runtime.engine.engine import Engine
from edge_runtime.errors import EdgeRuntimeError, OverloadedError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.cluster.partitioned_model import PartitionedModel
    from edge_runtime.personalize.records import Record

_log = logging.getLogger("edgert.worker")

# Prompt tokens at once while no answer is running: enough for the kernels' full speed, and a request that
# arrives meanwhile, or is given up, waits for no more than that.
_PREFILL_ALONE = 128

Value = TypeVar("Value")


class Observer(Protocol):
    """Who is told what happened, on the event loop."""

    def tokens(self, count: int) -> None:
        """So many were generated just now."""

    def finished(self, outcome: str, usage: Usage | None) -> None:
        """A request has ended: ``stop``, ``length``, ``cancelled``, or an error's code."""


@dataclass(slots=True, eq=False)
class _Job:
    decoding: Decoding
    client: str
    seconds: float
    arrived: float
    answer: Answer
    queue_seconds: float = 0.0
    cancelled: bool = False

    @property
    def state(self) -> RequestState:
        if self.decoding.place is None:
            return "queued"
        return "prefill" if self.decoding.is_prefilling else "decode"

    def usage(self) -> Usage:
        decoding = self.decoding
        return Usage(
            finish_reason=decoding.finish_reason or "stop",
            seed=decoding.seed,
            prompt_tokens=decoding.prompt_tokens,
            reused_tokens=decoding.reused_tokens,
            generated_tokens=decoding.generated_tokens,
            queue_seconds=self.queue_seconds,
            prefill_seconds=decoding.prefill_seconds,
            decode_seconds=decoding.decode_seconds,
            contributions=counts_of(decoding.forwarding),
        )


@dataclass(frozen=True, slots=True)
class _News:
    """What one step did for a job: a piece, an end, or an error."""

    job: _Job
    piece: Piece | None = None
    ended: bool = False
    error: BaseException | None = None


class _Call(NamedTuple):
    function: Callable[[], Any]
    outcome: Future[Any]
    takes_place: bool


class Worker:
    """One engine with its queue. Methods are called on the event loop unless they say otherwise.

    Args:
        name: of the model.
        turn: held while computing; engines that share a lock take turns, token by token.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        scheduling: SchedulingConfig,
        observer: Observer,
        turn: threading.Lock,
    ) -> None:
        self.name = name
        self.engine = engine
        self.used = time.monotonic()  # when a request last arrived
        self.beat = time.monotonic()  # when the thread last showed that it is alive
        # What must be told once the thread has ended and before the engine is freed.
        self.before_freeing: Callable[[], Awaitable[None]] | None = None
        self.partition: PartitionedModel | None = None  # where other devices compute too
        self.identity = ""  # of the model's file, for the store of adapters
        self.adapters: tuple[Record, ...] = ()  # that are applied
        # Who computes with the engine on a thread of their own -> what ends that, awaited before it is freed.
        self.users: dict[object, Callable[[], Awaitable[None]]] = {}
        self.turn = turn
        self._scheduling = scheduling
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._queue: FairQueue[_Job] = FairQueue()
        self._running: list[_Job] = []
        self._calls: deque[_Call] = deque()
        self._refusing = False
        self._hurried = False
        self._stopping = False
        self._seconds_per_request = 1.0
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    # --- on the event loop --------------------------------------------------------------------

    def submit(self, decoding: Decoding, client: str, timeout: float | None) -> Answer:
        """Let a request wait for its turn.

        Args:
            timeout: seconds from now on; None or more than the daemon allows: the daemon's limit.

        Raises:
            OverloadedError: the queue is full. UnavailableError: the model is being unloaded.
        """
        limit = self._scheduling.request_seconds
        seconds = limit if timeout is None else min(timeout, limit)
        with self._changed:
            if self._refusing:
                raise UnavailableError(f"the model {self.name!r} is being unloaded; try again")
            # Those for whom there is a place do not wait: the thread just has not come round to them.
            free = len(self.engine.places) - len(self._running)
            if len(self._queue) >= self._scheduling.queue + free:
                wait = max(1.0, self._seconds_per_request * (len(self._queue) + 1) / len(self.engine.places))
                self._observer.finished(OverloadedError.code, None)
                raise OverloadedError(
                    f"{len(self._running)} requests are running and {len(self._queue)} of at most "
                    f"{self._scheduling.queue} are waiting; try again in {wait:.0f} s",
                    retry_after=wait,
                )
            self.used = time.monotonic()
            answer = Answer(self.name, decoding.prompt_tokens, lambda: self._cancel(job))
            job = _Job(decoding, client, seconds, self.used, answer)
            self._queue.push(client, job)
            self._changed.notify()
        return answer

    def call(self, function: Callable[[], Value], *, takes_place: bool = True) -> asyncio.Future[Value]:
        """Run something with the engine between two tokens.

        Args:
            takes_place: whether it waits until a place is free, as it needs one.
        """
        outcome: Future[Value] = Future()
        with self._changed:
            if self._stopping:
                raise UnavailableError(f"the model {self.name!r} is being unloaded; try again")
            self.used = time.monotonic()
            self._calls.append(_Call(function, outcome, takes_place))
            self._changed.notify()
        return asyncio.wrap_future(outcome)

    def requests(self) -> list[RequestStatus]:
        """What waits and what runs, oldest first."""
        now = time.monotonic()
        with self._changed:
            jobs = sorted([*self._running, *self._queue], key=lambda job: job.arrived)
            return [
                RequestStatus(
                    id=job.answer.id,
                    client=job.client,
                    model=self.name,
                    state=job.state,
                    prompt_tokens=job.decoding.prompt_tokens,
                    generated_tokens=job.decoding.generated_tokens,
                    seconds=now - job.arrived,
                )
                for job in jobs
            ]

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs, or somebody else computes with the engine."""
        return bool(self.users) or self.answering

    @property
    def answering(self) -> bool:
        """Whether anything waits or runs; from any thread."""
        with self._changed:
            return bool(self._queue or self._running or self._calls)

    async def apply(self, adapters: Adapters) -> None:
        """Apply these adapters, and no others, from the next answer on.

        Raises:
            RequestError: one does not fit the model; the old ones stay. OutOfMemoryError: they do not fit.
        """
        if self.partition is not None:
            await self.partition.set_adapters(adapters)
        else:
            await self.call(partial(self.engine.set_adapters, adapters), takes_place=False)

    async def close(self, seconds: float) -> None:
        """Take nothing new, let what runs and waits finish for so long, cancel the rest, free the model."""
        with self._changed:
            self._refusing = True
        for let_go in list(self.users.values()):
            await let_go()
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end and not self._hurried:
            await asyncio.sleep(0.02)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # the last news
        if self.before_freeing is not None:
            await self.before_freeing()
        self.engine.close()

    def hurry(self) -> None:
        """Let `close` wait no longer."""
        self._hurried = True

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            waiting = self._queue.remove(job)
            self._changed.notify()
        if waiting:
            self._observer.finished("cancelled", None)

    def _tell(self, news: list[_News]) -> None:
        """Hand a step's outcome to those who wait."""
        count = 0
        for item in news:
            job, answer = item.job, item.job.answer
            if item.piece is not None and (item.piece.text or item.piece.tokens):
                answer.put(Chunk(*item.piece))
                count += len(item.piece.tokens)
            if item.error is not None:
                answer.fail(item.error)
                code = item.error.code if isinstance(item.error, EdgeRuntimeError) else "internal"
                self._observer.finished(code, None)
            elif item.ended and job.cancelled:
                self._observer.finished("cancelled", None)
            elif item.ended:
                usage = job.usage()
                answer.finish(usage)
                taken = usage.prefill_seconds + usage.decode_seconds
                self._seconds_per_request += 0.2 * (taken - self._seconds_per_request)
                self._observer.finished(usage.finish_reason, usage)
        if count:
            self._observer.tokens(count)

    # --- on the worker's own thread -----------------------------------------------------------

    def _run(self) -> None:
        while True:
            self.beat = time.monotonic()
            with self._changed:
                if not (self._stopping or self._queue or self._running or self._calls):
                    self._changed.wait(1.0)
                stopping = self._stopping
                news = self._leave(stopping)
                call = self._next_call(anyhow=stopping)
                if call is None:
                    news += self._join()
                jobs = list(self._running)
            if stopping and not jobs and call is None:
                self._send(news)
                return
            if call is not None:
                self._answer_call(call.function, call.outcome, stopping=stopping)
            self._send(news + self._advance(jobs))

    def _leave(self, everyone: bool) -> list[_News]:
        """Take out who has gone away or whose time is over. The lock is held."""
        now = time.monotonic()
        news = []
        for job in [*self._queue, *self._running]:
            error: BaseException | None = None
            if everyone and not job.cancelled:
                error = UnavailableError("the daemon stops before the answer is complete; ask again later")
            elif not job.cancelled and now - job.arrived > job.seconds:
                error = deadline_error(job.seconds, job.decoding.generated_tokens)
            elif not job.cancelled:
                continue
            if not self._queue.remove(job):
                self._running.remove(job)
                self.engine.end(job.decoding)
            news.append(_News(job, ended=True, error=error))
        return news

    def _next_call(self, *, anyhow: bool) -> _Call | None:
        """The oldest call that can run now. The lock is held."""
        for call in self._calls:
            if anyhow or not call.takes_place or self.engine.places.n_free:
                self._calls.remove(call)
                return call
        return None

    def _join(self) -> list[_News]:
        """Let requests that wait into the batch while there are places. The lock is held."""
        news = []
        while self._queue and self.engine.places.n_free:
            job = self._queue.pop()
            job.queue_seconds = time.monotonic() - job.arrived
            try:
                self.engine.begin(job.decoding)
            except EdgeRuntimeError as error:  # what it asks for was undone while it waited
                news.append(_News(job, error=error))
            else:
                self._running.append(job)
        return news

    def _advance(self, jobs: list[_Job]) -> list[_News]:
        """One forward pass."""
        if not jobs:
            return []
        prefilling = [job for job in jobs if job.decoding.is_prefilling]
        answering = len(prefilling) < len(jobs)
        budget = self._scheduling.prefill_chunk if answering else _PREFILL_ALONE
        of_decoding = {id(job.decoding): job for job in jobs}
        try:
            with self.turn:
                pieces = self.engine.advance([job.decoding for job in jobs], budget)
        except Exception as error:
            _log.exception("a step failed; its %d requests are given up", len(jobs))
            with self._changed:
                for job in jobs:
                    self._running.remove(job)
                    self.engine.end(job.decoding)
                self.engine.places.forget()
            return [_News(job, error=error) for job in jobs]
        news = []
        with self._changed:
            if prefilling:  # the next chunk belongs to the next prompt
                self._running.remove(prefilling[0])
                self._running.append(prefilling[0])
            for decoding, piece in pieces:
                job = of_decoding[id(decoding)]
                ended = decoding.finish_reason is not None
                if ended:
                    self._running.remove(job)
                    self.engine.end(decoding)
                news.append(_News(job, piece, ended))
        return news

    def _answer_call(self, function: Callable[[], Any], outcome: Future[Any], *, stopping: bool) -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            if stopping:
                raise UnavailableError("the daemon stops; ask again later")
            with self.turn:
                value = function()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)

    def _send(self, news: list[_News]) -> None:
        if news:
            self._loop.call_soon_threadsafe(partial(self._tell, news))
