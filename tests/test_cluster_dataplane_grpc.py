"""The data plane over real streams: the same answers as over datagrams, and streams that break."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from dataplane_fixture import (
    HOST,
    SESSION,
    WIDTH,
    Computing,
    Floats,
    collect,
    join,
    nothing_comes,
    sums_of,
    until,
)

from edge_runtime.cluster.exchange import Refusal, RefusalReason, RefusedError
from edge_runtime.cluster.grpc_link import GrpcLink
from edge_runtime.cluster.grpc_worker import MAX_MESSAGE_BYTES, serve_compute
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.errors import RequestError
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

INPUTS = random.Random(1).randbytes(2176)
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
]
Serve = Callable[[AsyncIterator[Any]], AsyncIterator[Any]]


class Server(cluster_pb2_grpc.ClusterServicer):
    """A server whose Compute is `serve`, on an event loop of its own."""

    def __init__(self, serve: Serve, port: int = 0) -> None:
        self._serve = serve
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(port), self.loop).result(10)

    async def Compute(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with aclosing(self._serve(request_iterator)) as responses:  # type: ignore[type-var]
            async for response in responses:
                yield response

    async def _start(self, port: int) -> int:
        self._server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        cluster_pb2_grpc.add_ClusterServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"{HOST}:{port}")
        await self._server.start()
        return int(bound)

    def tasks(self) -> str:
        """All that runs, for a search by name."""
        return str([task.get_coro() for task in asyncio.all_tasks(self.loop)])

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self.loop).result(10)

        async def others() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(others(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def linked(server: Server, session: int = SESSION) -> Iterator[GrpcLink]:
    """A link whose worker 1 is the server."""
    link = GrpcLink()
    with grpc.insecure_channel(f"{HOST}:{server.port}", OPTIONS) as channel:
        link.add_worker(1, channel, session)
        link.begin_step(1)
        try:
            yield link
        finally:
            readers = [peer.stream.reader for peer in link._workers.values() if peer.stream is not None]
            link.close()
    assert not any(thread is peer for peer in readers for thread in threading.enumerate())


@contextmanager
def streaming(computing: Computing) -> Iterator[tuple[GrpcLink, UdpWorker, Server]]:
    worker = UdpWorker(HOST, 0, computing)
    server = Server(lambda requests: serve_compute(worker, requests))
    try:
        with linked(server) as link:
            yield link, worker, server
    finally:
        computing.gate.set()
        server.stop()
        worker.stop()


def refused(link: GrpcLink) -> list[Refusal]:
    found: list[Refusal] = []
    until(lambda: link.receive(0.05) is None and bool(found.extend(link.take_refusals()) or found))
    return found


def test_answers_arrive_whole_and_bit_by_bit() -> None:
    with streaming(Computing()) as (link, _, _server):
        for layer in range(5):
            link.send(1, 1, layer, 1, INPUTS, plan=70_001, exact=False, copies=3, n_values=WIDTH)
        found = collect(link, layers=5)
    for (_, layer), values in found.items():
        assert (values == sums_of(70_001 & 0xFFFF, layer, 1, INPUTS)[0]).all()


def test_a_batch_of_a_prompt_travels_at_once() -> None:
    with streaming(Computing()) as (link, _, _server):
        link.send(1, 1, 3, 512, INPUTS * 512, plan=1, n_values=512 * WIDTH)
        answer = link.receive(20)
    assert answer is not None
    assert (answer.values == sums_of(1, 3, 512, INPUTS * 512).reshape(-1)).all()
    assert (answer.first, answer.fragment, answer.n_fragments, answer.n_values) == (0, 0, 1, 512 * WIDTH)
    assert answer.compute_seconds > 0


def test_a_result_may_be_overwritten_by_the_next() -> None:
    kept = np.empty((1, WIDTH), np.float32)

    def reuse(layer: int, sums: Floats) -> Floats:
        np.copyto(kept, sums)
        return kept

    computing = Computing()
    computing.instead = reuse
    with streaming(computing) as (link, _, server), linked(server, session=8) as other:
        for layer in range(20):
            for each in (link, other):
                each.send(1, 1, layer, 1, INPUTS, plan=1 if each is link else 2)
        for plan, each in enumerate((link, other), start=1):
            for (_, layer), values in collect(each, layers=20).items():
                assert (values == sums_of(plan, layer, 1, INPUTS)[0]).all()
        assert len(computing.threads) == 1


def test_streams_and_datagrams_share_the_thread_that_computes() -> None:
    computing = Computing()
    with streaming(computing) as (link, worker, _server):
        datagrams = UdpLink(HOST)
        try:
            join(datagrams, worker, worker.port)
            datagrams.begin_step(1)
            for layer in range(5):
                link.send(1, 1, layer, 1, INPUTS, plan=1)
                datagrams.send(1, 1, layer, 1, INPUTS, plan=1)
            assert set(collect(link, layers=5)) == set(collect(datagrams, layers=5))
        finally:
            datagrams.close()
    assert len(computing.threads) == 1 and len(computing.calls) == 10


def test_a_ping_measures_the_round_trip_and_is_a_sign_of_life() -> None:
    computing = Computing()
    with streaming(computing) as (link, _, _server):
        assert np.isnan(link.round_trips(1)) and link.last_seen(1) == -np.inf
        link.ping(1)
        until(lambda: link.receive(0.01) is None and link.last_seen(1) > 0)
        assert 0 < link.round_trips(1) < 5
    assert not computing.calls


def test_answers_to_an_earlier_step_are_stale() -> None:
    computing = Computing()
    with streaming(computing) as (link, _, _server):
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        until(lambda: link.statistics(1).received == 1)
        link.begin_step(2)  # it has come and was not looked at
        computing.gate.clear()
        link.send(1, 2, 0, 1, INPUTS, plan=1)
        until(lambda: len(computing.calls) == 2)
        link.begin_step(3)  # it is being computed
        computing.gate.set()
        link.send(1, 3, 7, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 7)}
        assert link.statistics(1).stale == 2


def test_a_newer_step_ends_what_waits_of_the_older() -> None:
    computing = Computing()
    with streaming(computing) as (link, _, _server):
        computing.gate.clear()
        for layer in range(3):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        until(lambda: len(computing.calls) == 1)
        link.begin_step(2)
        link.send(1, 2, 9, 1, INPUTS, plan=1)
        # Long enough for the message to arrive; where it does not, layer 1 is computed in vain.
        nothing_comes(link, 0.1)
        computing.gate.set()
        assert set(collect(link)) == {(1, 9)}
    assert computing.layers == [0, 9]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RefusedError(RefusalReason.PLAN), RefusalReason.PLAN),
        (RuntimeError("broken"), RefusalReason.FAILED),
    ],
    ids=["plan", "failed"],
)
def test_a_failure_is_told_and_ends_nothing(error: Exception, reason: RefusalReason) -> None:
    def fail(layer: int, sums: Floats) -> Floats:
        raise error

    computing = Computing()
    computing.instead = fail
    with streaming(computing) as (link, _, _server):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert refused(link) == [Refusal(1, 1, 5, reason)]
        computing.instead = None
        link.send(1, 1, 6, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 6)}
        assert link.statistics(1).refusals == 1


def test_sums_beyond_a_message_are_refused() -> None:
    with streaming(Computing(width=(4 << 20) - 100)) as (link, _, _server):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert refused(link) == [Refusal(1, 1, 5, RefusalReason.INVALID)]


def test_an_error_among_the_requests_ends_the_stream_and_the_next_opens_another() -> None:
    worker = UdpWorker(HOST, 0, Computing())

    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if request.layer == 3:
                raise RequestError("not yours")
            yield request

    server = Server(lambda requests: serve_compute(worker, checked(requests)))
    try:
        with linked(server) as link:
            link.send(1, 1, 3, 1, INPUTS, plan=1)
            assert refused(link) == [Refusal(1, 1, 3, RefusalReason.FAILED)]

            def answered() -> bool:
                link.repeat(1, 1, 4, -1)
                return link.receive(0.05) is not None

            link.send(1, 1, 4, 1, INPUTS, plan=1)
            until(answered)
    finally:
        server.stop()
        worker.stop()


def test_a_server_that_ends_refuses_what_is_outstanding_and_is_found_again() -> None:
    computing = Computing()
    worker = UdpWorker(HOST, 0, computing)
    server = Server(lambda requests: serve_compute(worker, requests))
    try:
        with linked(server) as link:
            computing.gate.clear()
            for layer in (0, 1):
                link.send(1, 1, layer, 1, INPUTS, plan=1)
            until(lambda: len(computing.calls) == 1)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            assert refused(link)[0].reason is RefusalReason.FAILED
            computing.gate.set()
            stopping.join(10)
            server = Server(lambda requests: serve_compute(worker, requests), server.port)
            step = 1

            def answered() -> bool:
                nonlocal step
                step += 1
                link.begin_step(step)
                link.send(1, step, 5, 1, INPUTS, plan=1)
                link.take_refusals()
                return link.receive(0.2) is not None

            until(answered)
            assert link.statistics(1).unsent > 0  # while there was no stream
    finally:
        computing.gate.set()
        server.stop()
        worker.stop()


def test_nobody_listening_refuses_at_once() -> None:
    link = GrpcLink()
    with grpc.insecure_channel(f"{HOST}:1", OPTIONS) as channel:
        link.add_worker(1, channel, SESSION)
        link.begin_step(1)
        link.send(1, 1, 2, 1, INPUTS, plan=1)
        assert refused(link) == [Refusal(1, 1, 2, RefusalReason.FAILED)]
        link.close()


def test_a_closed_channel_refuses_at_once() -> None:
    link = GrpcLink()
    channel = grpc.insecure_channel(f"{HOST}:1", OPTIONS)
    link.add_worker(1, channel, SESSION)
    channel.close()
    link.begin_step(1)
    link.send(1, 1, 2, 1, INPUTS, plan=1)
    assert refused(link) == [Refusal(1, 1, 2, RefusalReason.FAILED)]
    link.close()


GOOD = np.ones(WIDTH, np.float32)


@pytest.mark.parametrize(
    "response",
    [
        wire.ComputeResponse(step=1, layer=5, n_rows=1, sums=GOOD[1:].tobytes()),
        wire.ComputeResponse(step=1, layer=5, n_rows=1, sums=GOOD.tobytes()[1:]),
        wire.ComputeResponse(step=1, layer=5, n_rows=2, sums=GOOD.tobytes()),
        wire.ComputeResponse(step=1, layer=6, n_rows=1, sums=GOOD.tobytes()),
        wire.ComputeResponse(step=1, layer=5, n_rows=1, sums=(GOOD * np.float32(np.nan)).tobytes()),
        wire.ComputeResponse(step=1, layer=5, n_rows=1, sums=(GOOD * np.float32(np.inf)).tobytes()),
        wire.ComputeResponse(step=1, layer=5, n_rows=99),
    ],
    ids=["short", "cut", "rows", "layer", "nan", "infinite", "reason"],
)
def test_a_wrong_answer_is_dropped_and_counted(response: wire.ComputeResponse) -> None:
    async def serve(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for _ in requests:
            yield response

    server = Server(serve)
    try:
        with linked(server) as link:
            link.send(1, 1, 5, 1, INPUTS, plan=1, n_values=WIDTH)
            until(lambda: link.receive(0.01) is None and link.statistics(1).received == 1)
            assert link.statistics(1).bad == 1
            assert not link.take_refusals()
    finally:
        server.stop()


def test_answers_beyond_those_asked_for_pile_up_nowhere() -> None:
    async def serve(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            for _ in range(500):
                yield wire.ComputeResponse(step=1, layer=request.layer, n_rows=1, sums=GOOD.tobytes())

    server = Server(serve)
    try:
        with linked(server) as link:
            link.send(1, 1, 5, 1, INPUTS, plan=1)
            until(lambda: link.statistics(1).received == 500)
            assert link.statistics(1).bad == 499
            assert link._inbox.qsize() == 1
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("layer", "n_rows", "inputs", "n_values"),
    [
        (1025, 1, INPUTS, 0),
        (-1, 1, INPUTS, 0),
        (1, 0, INPUTS, 0),
        (1, 513, INPUTS, 0),
        (1, 1, b"", 0),
        (1, 1, b"\0", 0),
        (1, 1, bytes(MAX_MESSAGE_BYTES), 0),
        (1, 1, INPUTS, MAX_MESSAGE_BYTES // 4),
    ],
    ids=["layer", "no layer", "no row", "rows", "nothing", "a ping", "inputs", "values"],
)
def test_a_request_out_of_range_is_a_mistake(layer: int, n_rows: int, inputs: bytes, n_values: int) -> None:
    link = GrpcLink()
    with grpc.insecure_channel(f"{HOST}:1") as channel:
        link.add_worker(1, channel, SESSION)
        with pytest.raises(RequestError, match=r"streams carry|a message takes"):
            link.send(1, 0, layer, n_rows, inputs, plan=1, n_values=n_values)
    link.close()


def test_a_worker_that_takes_nothing_fills_no_memory() -> None:
    async def serve(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        await asyncio.sleep(3600)
        yield None

    server = Server(serve)
    try:
        with linked(server) as link:
            big = bytes(8 << 20)
            for layer in range(20):
                link.send(1, 1, layer, 1, big, plan=1)
            assert link.statistics(1).unsent >= 8
            assert {refusal.reason for refusal in refused(link)} == {RefusalReason.FAILED}
    finally:
        server.stop()


def test_a_stream_that_is_given_up_leaves_nothing_running() -> None:
    computing = Computing()
    with streaming(computing) as (link, _, server):
        computing.gate.clear()
        for layer in range(12):  # more than are read ahead
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        until(lambda: len(computing.calls) == 1)
        nothing_comes(link, 0.05)
        link.close()
        computing.gate.set()
        until(lambda: "serve_compute" not in server.tasks() and "_read_ahead" not in server.tasks())
        assert computing.layers == [0]


def test_workers_come_and_go() -> None:
    with streaming(Computing()) as (link, _, server):
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        collect(link)
        link.remove_worker(1)
        link.remove_worker(1)
        with pytest.raises(RequestError, match="worker 1 is not one of this link's"):
            link.ping(1)
        with grpc.insecure_channel(f"{HOST}:{server.port}", OPTIONS) as channel:
            link.add_worker(2, channel, SESSION)
            link.send(2, 1, 0, 1, INPUTS, plan=1)
            assert set(collect(link)) == {(2, 0)}
            link.close()
            link.close()
