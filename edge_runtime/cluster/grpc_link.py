"""The coordinator's end of the data plane over streams: one for each worker, opened when first needed."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import grpc
import numpy as np

from edge_runtime.cluster.exchange import MAX_LAYER, MAX_ROWS, Answer, Refusal, RefusalReason, TrafficCounts
from edge_runtime.cluster.grpc_worker import MAX_MESSAGE_BYTES, MOST_SUM_BYTES, PING_INPUTS
from edge_runtime.errors import RequestError
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

_MOST_INPUT_BYTES = MAX_MESSAGE_BYTES - 1024
_MOST_QUEUED_BYTES = 64 << 20  # inputs that a worker has not taken yet
_MOST_REFUSALS = 256
_REOPEN_SECONDS = 0.5  # after a stream broke
_JOIN_SECONDS = 5.0


class _Stream:
    """A call that is open: what is to be sent on it, and its size."""

    def __init__(self) -> None:
        self.outgoing: queue.SimpleQueue[wire.ComputeRequest | None] = queue.SimpleQueue()
        self.queued_bytes = 0
        self.call: Any = None
        self.reader: threading.Thread | None = None

    def end(self) -> None:
        self.outgoing.put(None)
        if self.call is not None:
            self.call.cancel()


class _Asked:
    """A request of the current step without answer."""

    def __init__(self, request: wire.ComputeRequest, n_values: int) -> None:
        self.request = request
        self.n_values = n_values
        self.stream: _Stream | None = None  # that it went out on


class _Worker:
    """What the link knows of a worker; guarded by the link's lock."""

    def __init__(self, number: int, channel: grpc.Channel, session: int) -> None:
        self.number = number
        self.session = session
        self.stub = cluster_pb2_grpc.ClusterStub(channel)
        self.stream: _Stream | None = None
        self.reopen_at = -math.inf
        self.asked: dict[int, _Asked] = {}  # by layer
        self.counts = TrafficCounts()
        self.round_trip = math.nan
        self.last_seen = -math.inf
        self.ping = 0
        self.pinged = 0.0


class GrpcLink:
    """A `Link` over streams; answers are whole and float32, whatever was asked for.

    A stream that breaks is opened again with the next request; until then its requests are refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self._step = 0
        # Answers, and None for a refusal. No more than one for each request of a step.
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._refusals: deque[Refusal] = deque(maxlen=_MOST_REFUSALS)

    # --- workers ------------------------------------------------------------------------------

    def add_worker(self, worker: int, channel: grpc.Channel, session: int) -> None:
        """Talk to a worker from now on, instead of one with the same number.

        Args:
            channel: to its Cluster service, with this device's certificate; it stays the caller's.
            session: its number at the worker.
        """
        self.remove_worker(worker)
        with self._lock:
            self._workers[worker] = _Worker(worker, channel, session)

    def remove_worker(self, worker: int) -> None:
        """End a worker's stream and forget it; nothing happens if there is none of this number."""
        with self._lock:
            peer = self._workers.pop(worker, None)
            stream = None
            if peer is not None:
                peer.asked.clear()  # nobody waits for a refusal
                stream = peer.stream
        if stream is not None:
            _end_and_wait([stream])

    def _worker(self, worker: int) -> _Worker:
        peer = self._workers.get(worker)
        if peer is None:
            raise RequestError(f"worker {worker} is not one of this link's: {sorted(self._workers)}")
        return peer

    # --- asking -------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Forget what earlier steps asked for; steps only grow. Answers to them count as stale."""
        with self._lock:
            self._step = step
            for peer in self._workers.values():
                peer.asked.clear()
        while True:
            try:
                answer = self._inbox.get_nowait()
            except queue.Empty:
                break
            peer_or_none = None if answer is None else self._workers.get(answer.worker)
            if peer_or_none is not None:
                peer_or_none.counts.stale += 1

    def send(
        self,
        worker: int,
        step: int,
        layer: int,
        n_rows: int,
        inputs: bytes,
        *,
        plan: int,
        copies: int = 1,
        exact: bool = True,
        n_values: int = 0,
    ) -> None:
        """See `Link.send`; `copies` and `exact` mean nothing on a stream."""
        peer = self._worker(worker)
        if step != self._step:
            raise RequestError(f"a request of step {step} in step {self._step}; begin_step comes first")
        if not (0 <= layer <= MAX_LAYER and 0 < n_rows <= MAX_ROWS):
            raise RequestError(
                f"layer {layer}, {n_rows} rows; streams carry layers up to {MAX_LAYER} and 1 to "
                f"{MAX_ROWS} rows"
            )
        if not 1 < len(inputs) <= _MOST_INPUT_BYTES or 4 * n_values > MOST_SUM_BYTES:
            raise RequestError(
                f"inputs of {len(inputs)} bytes for {n_values} values; a message takes 2 to "
                f"{_MOST_INPUT_BYTES} bytes and {MOST_SUM_BYTES // 4} values; send fewer rows at once"
            )
        request = wire.ComputeRequest(
            session=peer.session, step=step, layer=layer, n_rows=n_rows, inputs=inputs, plan=plan
        )
        with self._lock:
            asked = peer.asked[layer] = _Asked(request, n_values)
            self._send(peer, asked)

    def repeat(self, worker: int, step: int, layer: int, missing: int) -> None:
        """See `Link.repeat`; what went out on a stream that lives comes back by itself."""
        peer = self._worker(worker)
        with self._lock:
            asked = peer.asked.get(layer)
            if asked is None or step != self._step or (asked.stream and asked.stream is peer.stream):
                return
            peer.counts.repeats += 1
            self._send(peer, asked)

    def _send(self, peer: _Worker, asked: _Asked) -> None:
        if self._put(peer, asked.request):
            asked.stream = peer.stream
        else:
            self._refuse(peer, asked.request.step, asked.request.layer, RefusalReason.FAILED)

    def _put(self, peer: _Worker, request: wire.ComputeRequest) -> bool:
        """Let a message go out; False where the worker has no stream now, or takes nothing from it."""
        stream = peer.stream or self._open(peer)
        size = len(request.inputs)
        if stream is None or stream.queued_bytes + size > _MOST_QUEUED_BYTES:
            peer.counts.unsent += 1
            return False
        stream.queued_bytes += size
        stream.outgoing.put(request)
        peer.counts.sent += 1
        peer.counts.sent_bytes += size
        return True

    def _open(self, peer: _Worker) -> _Stream | None:
        if perf_counter() < peer.reopen_at:
            return None
        stream = _Stream()
        try:
            stream.call = peer.stub.Compute(self._outgoing(stream))
        except ValueError:  # the channel was closed
            peer.reopen_at = perf_counter() + _REOPEN_SECONDS
            return None
        stream.reader = threading.Thread(
            target=self._read, args=(peer, stream), name="edgert-stream", daemon=True
        )
        peer.stream = stream
        stream.reader.start()
        return stream

    def _outgoing(self, stream: _Stream) -> Iterator[wire.ComputeRequest]:
        """What grpc's thread sends; requests of a step that is over stay here."""
        while (request := stream.outgoing.get()) is not None:
            with self._lock:
                stream.queued_bytes -= len(request.inputs)
                over = request.step != self._step and request.inputs != PING_INPUTS
            if not over:
                yield request

    def ping(self, worker: int) -> None:
        """See `Link.ping`."""
        peer = self._worker(worker)
        with self._lock:
            peer.ping = peer.ping % 0xFFFFFFFF + 1
            peer.pinged = perf_counter()
            message = wire.ComputeRequest(session=peer.session, step=peer.ping, n_rows=1, inputs=PING_INPUTS)
            self._put(peer, message)

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, timeout: float) -> Answer | None:
        """See `Link.receive`."""
        end = perf_counter() + timeout
        while True:
            try:
                if timeout > 0:
                    answer = self._inbox.get(timeout=max(end - perf_counter(), 0.0))
                else:
                    answer = self._inbox.get_nowait()
            except queue.Empty:
                return None
            if answer is not None:
                return answer
            if timeout > 0 and self._refusals:
                return None

    def _read(self, peer: _Worker, stream: _Stream) -> None:
        """A stream's thread."""
        try:
            for response in stream.call:
                with self._lock:
                    self._take_in(peer, response)
        except grpc.RpcError:
            pass  # what it means is the same as the stream's end
        finally:
            with self._lock:
                self._broken(peer, stream)

    def _broken(self, peer: _Worker, stream: _Stream) -> None:
        stream.end()
        if peer.stream is not stream:
            return
        peer.stream = None
        peer.reopen_at = perf_counter() + _REOPEN_SECONDS
        for layer, asked in peer.asked.items():
            if asked.stream is stream:
                self._refuse(peer, asked.request.step, layer, RefusalReason.FAILED)

    def _refuse(self, peer: _Worker, step: int, layer: int, reason: RefusalReason) -> None:
        self._refusals.append(Refusal(peer.number, step, layer, reason))
        self._inbox.put(None)

    def _take_in(self, peer: _Worker, response: wire.ComputeResponse) -> None:
        counts = peer.counts
        counts.received += 1
        counts.received_bytes += len(response.sums)
        peer.last_seen = perf_counter()
        if not response.sums and not response.n_rows:
            if response.step == peer.ping:
                peer.round_trip = peer.last_seen - peer.pinged
            return
        if response.step != self._step:
            counts.stale += 1
            return
        asked = peer.asked.get(response.layer)
        if asked is None:
            counts.bad += 1
        elif not response.sums:
            if response.n_rows in RefusalReason.__members__.values():
                counts.refusals += 1
                self._refuse(peer, response.step, response.layer, RefusalReason(response.n_rows))
            else:
                counts.bad += 1
        else:
            self._answer(peer, asked, response)

    def _answer(self, peer: _Worker, asked: _Asked, response: wire.ComputeResponse) -> None:
        n_rows, n_bytes = asked.request.n_rows, len(response.sums)
        count = n_bytes // 4
        fits = n_bytes % (4 * n_rows) == 0 and count == (asked.n_values or count)
        if response.n_rows == n_rows and fits:
            values = np.frombuffer(response.sums, "<f4")
            if np.isfinite(values).all():
                del peer.asked[response.layer]
                took = response.compute_microseconds * 1e-6
                self._inbox.put(
                    Answer(peer.number, response.step, response.layer, 0, values, 0, 1, took, count)
                )
                return
        peer.counts.bad += 1

    # --- what is known ------------------------------------------------------------------------

    def take_refusals(self) -> list[Refusal]:
        """See `Link.take_refusals`."""
        with self._lock:
            refusals = list(self._refusals)
            self._refusals.clear()
        return refusals

    def round_trips(self, worker: int) -> float:
        """See `Link.round_trips`."""
        return self._worker(worker).round_trip

    def last_seen(self, worker: int) -> float:
        """See `Link.last_seen`."""
        return self._worker(worker).last_seen

    def statistics(self, worker: int) -> TrafficCounts:
        """See `Link.statistics`."""
        return self._worker(worker).counts

    def close(self) -> None:
        """End all streams; safe to call twice."""
        with self._lock:
            peers = list(self._workers.values())
            self._workers.clear()
        _end_and_wait([peer.stream for peer in peers if peer.stream is not None])


def _end_and_wait(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.end()
    for stream in streams:
        if stream.reader is not None:
            stream.reader.join(_JOIN_SECONDS)
