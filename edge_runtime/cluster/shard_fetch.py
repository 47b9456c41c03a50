"""Bring shards here: from the disk, from a neighbour, from the coordinator; several at once, none twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from edge_runtime.cluster.manifest import Manifest, Shard, Wanted
from edge_runtime.cluster.shard_cache import Arriving, ShardCache
from edge_runtime.cluster.shard_source import Source
from edge_runtime.errors import DownloadError, EdgeRuntimeError, ModelNotFoundError, UnavailableError

IN_FLIGHT = 4
_REPORT_SECONDS = 0.25
_FRUITFUL_BYTES = 64 << 10  # a try that brings fewer counts as a failed one
_MANY_MISSES = 16  # shards in a row that a neighbour lacked: it is asked last from then on
_LONGEST_REST_SECONDS = 60.0  # of a source that failed; it is asked only if nobody else can help
_TRIES_OF_THE_DISK = 3

Progress = Callable[[int, int, int], None]
"""Called with bytes that were here already, bytes fetched, and bytes in all."""


class ReadyShard(NamedTuple):
    """A shard's bytes, verified; `layer` and `number` as in `Shard`."""

    layer: int
    number: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try.

    Attributes:
        rounds: in a row through all sources that bring nothing, for one shard, before giving up.
        first_pause_seconds, longest_pause_seconds: between rounds; doubles from one to the other.
    """

    rounds: int = 5
    first_pause_seconds: float = 0.2
    longest_pause_seconds: float = 5.0


@dataclass(slots=True, eq=False)
class _Peer:
    """What is known of a source in this run."""

    source: Source
    order: int
    is_last: bool
    in_flight: int = 0
    misses: int = 0
    failures: int = 0
    resting_until: float = 0.0
    banned: bool = False


class _Misbehaved(Exception):  # noqa: N818 - leads to another source
    """A source sent what no sound one does."""


@dataclass(slots=True)
class _Transfer:
    """One shard on its way.

    Attributes:
        givers: peers whose bytes are part of it.
        mixing: whether bytes of several sources may be put together.
        reasons: why sources did not help, by name.
    """

    shard: Shard
    arriving: Arriving
    givers: set[_Peer] = field(default_factory=set)
    mixing: bool = True
    reasons: dict[str, str] = field(default_factory=dict)


class ShardFetch:
    """One run that brings shards into the cache and into memory. Iterate once, then it is spent.

    While it is iterated, `in_flight` shards are read or fetched in threads and up to as many wait in memory,
    so that what the caller does with one overlaps the arrival of the next. However the iteration ends, the
    threads have ended then, and bytes of unfinished shards are kept for the next run.

    Args:
        wanted: what to bring.
        cache: where shards are kept; they are claimed while this runs.
        sources: the nearest first, the coordinator last. It is asked only for what neighbours lack.
        progress: called by the iterating thread.

    Raises:
        RequestError: `wanted` names what the model does not have.
    """

    def __init__(
        self,
        manifest: Manifest,
        wanted: Wanted,
        cache: ShardCache,
        sources: Sequence[Source],
        *,
        in_flight: int = IN_FLIGHT,
        progress: Progress = lambda cached, fetched, total: None,
        patience: Patience | None = None,
    ) -> None:
        self._shards = manifest.shards(wanted)
        self._total = sum(shard.size for shard in self._shards)
        self._cache = cache
        last = len(sources) - 1
        self._peers = [_Peer(source, order, order == last) for order, source in enumerate(sources)]
        self._in_flight = in_flight
        self._progress = progress
        self._patience = patience or Patience()
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of peers, counts and streams
        self._cached = self._fetched = 0
        self._transfers: set[Arriving] = set()
        self._streams: set[Iterator[bytes]] = set()

    def cancel(self) -> None:
        """Stop soon, from any thread; the iteration then raises UnavailableError."""
        self._stop.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            _close(stream)

    def __iter__(self) -> Iterator[ReadyShard]:
        """Shards as they become ready, about in the order of layers, the head last.

        Raises:
            DownloadError: a shard cannot be had from any source, or the disk has no room or fails.
            UnavailableError: `cancel` was called.
        """
        sizes = {shard.digest: shard.size for shard in self._shards}
        with self._cache.claim(sizes), ThreadPoolExecutor(self._in_flight, "shards") as pool:
            try:
                yield from self._run(pool)
            finally:
                self.cancel()

    def _run(self, pool: ThreadPoolExecutor) -> Iterator[ReadyShard]:
        todo = iter(self._shards)
        pending = {pool.submit(self._bring, shard) for shard in islice(todo, self._in_flight)}
        self._report()
        while pending:
            done, pending = wait(pending, _REPORT_SECONDS, FIRST_COMPLETED)
            ready = sorted(future.result() for future in done)
            self._check_stop()
            pending |= {pool.submit(self._bring, shard) for shard in islice(todo, len(ready))}
            self._report()
            yield from ready

    def _report(self) -> None:
        with self._lock:
            cached = self._cached + sum(arriving.resumed for arriving in self._transfers)
            fetched = self._fetched + sum(arriving.size - arriving.resumed for arriving in self._transfers)
        self._progress(cached, min(fetched, self._total - cached), self._total)

    # --- one shard, in a thread ---------------------------------------------------------------

    def _bring(self, shard: Shard) -> ReadyShard:
        is_counted = False
        for _ in range(_TRIES_OF_THE_DISK):
            self._check_stop()
            content = self._cache.read(shard.digest, shard.size)
            if content is not None:
                if not is_counted:
                    with self._lock:
                        self._cached += shard.size
                return ReadyShard(shard.layer, shard.number, content)
            arriving = self._cache.arrive(shard.digest, shard.size, self._stop)
            if arriving is not None:
                with arriving, self._counted(arriving):
                    self._fill(_Transfer(shard, arriving))
                    is_counted = True
        raise DownloadError(
            f"{_title(shard)} was damaged on the disk {_TRIES_OF_THE_DISK} times; "
            f"check the disk of {self._cache.folder}"
        )

    @contextmanager
    def _counted(self, arriving: Arriving) -> Iterator[None]:
        with self._lock:
            self._transfers.add(arriving)
        try:
            yield
        finally:
            with self._lock:
                self._transfers.discard(arriving)
                self._cached += arriving.resumed
                self._fetched += arriving.size - arriving.resumed

    def _fill(self, transfer: _Transfer) -> None:
        """Ask one source after another until the shard is whole."""
        shard, arriving = transfer.shard, transfer.arriving
        tried: set[_Peer] = set()
        rounds, round_start = 0, arriving.size
        while True:
            self._check_stop()
            if arriving.size == shard.size:
                resumed = arriving.resumed
                if arriving.finish():
                    return
                self._blame(transfer, resumed)
                round_start = 0
            peer = self._pick(tried)
            if peer is not None:
                self._ask(peer, transfer)
                tried.add(peer)
                continue
            rounds = 0 if arriving.size >= round_start + _FRUITFUL_BYTES else rounds + 1
            if rounds >= self._patience.rounds or all(peer.banned for peer in self._peers):
                reasons = "; ".join(transfer.reasons.values()) or "there is nobody to ask"
                raise DownloadError(
                    f"{_title(transfer.shard)} cannot be had: {reasons}; what has arrived is kept, "
                    "try again when one of these devices can be reached"
                )
            pause = self._patience.first_pause_seconds * 2 ** max(0, rounds - 1)
            self._stop.wait(min(pause, self._patience.longest_pause_seconds))
            tried.clear()
            round_start = arriving.size

    def _pick(self, tried: set[_Peer]) -> _Peer | None:
        now = time.monotonic()
        with self._lock:
            possible = [peer for peer in self._peers if peer not in tried and not peer.banned]
            if not possible:
                return None

            def rank(peer: _Peer) -> tuple[bool, bool, bool, int, int]:
                lacks_many = peer.misses >= _MANY_MISSES
                return peer.resting_until > now, lacks_many, peer.is_last, peer.in_flight, peer.order

            chosen = min(possible, key=rank)
            chosen.in_flight += 1
            return chosen

    def _ask(self, peer: _Peer, transfer: _Transfer) -> None:
        """Take what a source gives."""
        arriving = transfer.arriving
        if not transfer.mixing:
            arriving.restart()
            transfer.givers.clear()
        before = arriving.size
        with closing(self._pieces(peer, transfer)) as pieces:
            for piece in pieces:
                arriving.write(piece)
        if arriving.size > before:
            transfer.givers.add(peer)

    def _pieces(self, peer: _Peer, transfer: _Transfer) -> Generator[bytes, None, None]:
        """What a source gives; how it served is remembered, and no failure of it leaves here."""
        shard, arriving = transfer.shard, transfer.arriving
        failure: Exception | None = None
        before = arriving.size
        try:
            with self._closable(peer.source.fetch(shard.digest, before)) as stream:
                for piece in stream:
                    if self._stop.is_set():
                        break
                    missing = shard.size - arriving.size
                    if not 0 < len(piece) <= missing:
                        raise _Misbehaved(f"sent {len(piece)} bytes where {missing} were missing")
                    yield piece
            if arriving.size < shard.size:
                raise UnavailableError(f"broke off after {arriving.size} of {shard.size} bytes")
        except (EdgeRuntimeError, OSError, _Misbehaved) as error:
            failure = error
            transfer.reasons[peer.source.name] = f"{peer.source.name}: {str(error)[:200]}"
        finally:
            self._judge(peer, failure, arriving.size - before)

    def _judge(self, peer: _Peer, failure: Exception | None, received: int) -> None:
        with self._lock:
            peer.in_flight -= 1
            if received > 0:
                peer.misses = peer.failures = 0
            if isinstance(failure, ModelNotFoundError):
                peer.misses += 1
            elif isinstance(failure, _Misbehaved):
                peer.banned = True
            elif failure is not None:
                peer.resting_until = time.monotonic() + min(2.0**peer.failures, _LONGEST_REST_SECONDS)
                peer.failures += 1

    def _blame(self, transfer: _Transfer, resumed: int) -> None:
        """The bytes were not the shard's: leave out who sent them all, or find out who it was."""
        if len(transfer.givers) == 1 and not resumed:
            (peer,) = transfer.givers
            peer.banned = True
            transfer.reasons[peer.source.name] = f"{peer.source.name}: sent bytes with another SHA-256"
        else:
            transfer.mixing = False
        transfer.givers.clear()

    @contextmanager
    def _closable(self, stream: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
        """The stream, among those that `cancel` closes."""
        with self._lock:
            self._streams.add(stream)
        if self._stop.is_set():  # `cancel` may have closed the others just before
            _close(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)
            _close(stream)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise UnavailableError("fetching shards was cancelled; what has arrived is kept")


def by_layer(ready: Iterable[ReadyShard], wanted: Wanted) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Shards of whole layers, number -> bytes, each as soon as the last of them is ready.

    Args:
        wanted: what the fetch behind `ready` was asked for.
    """
    waiting: dict[int, dict[int, bytes]] = {}
    for layer, number, content in ready:
        waiting.setdefault(layer, {})[number] = content
        if len(waiting[layer]) == len(wanted[layer]):
            yield layer, waiting.pop(layer)


def _close(stream: Iterator[bytes]) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        with suppress(ValueError, OSError):  # a generator that another thread runs cannot be closed
            close()


def _title(shard: Shard) -> str:
    return f"shard {shard.digest.hex()[:16]} (layer {shard.layer}, number {shard.number})"
