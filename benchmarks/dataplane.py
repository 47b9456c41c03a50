"""What one exchange of the data plane takes on loopback: ``python -m benchmarks.dataplane [--quick]``.

One exchange is a layer's inputs sent to a worker (2,048 values in Q8_0) and its contribution received and
added up (2,048 values), without any computing. Both ends are processes of their own, each on a core of its
own where there are two. The kinds take turns, step by step; a step is 23 exchanges. The CPU time is that of
the whole process, so with the kernel's part of sending and receiving.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from benchmarks.report import Report
from edge_runtime.cluster.exchange import Floats, Inputs, Link
from edge_runtime.cluster.grpc_link import GrpcLink
from edge_runtime.cluster.grpc_worker import serve_compute
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.engine.activations import ActivationForm, encode
from edge_runtime.v1 import cluster_pb2_grpc

_HOST = "127.0.0.1"
_WIDTH = 2048
_EXCHANGES = 23  # of a token: 22 layers and the head
_STREAM_SESSION = 100
# name -> size of datagrams, exact, copies
_KINDS = {
    "exact": (1400, True, 1),
    "exact, 1472 bytes": (1472, True, 1),
    "exact, 2 copies": (1400, True, 2),
    "relaxed": (1400, False, 1),
    "relaxed, 2 copies": (1400, False, 2),
}


class _Servicer(cluster_pb2_grpc.ClusterServicer):
    def __init__(self, worker: UdpWorker) -> None:
        self._worker = worker

    async def Compute(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for response in serve_compute(self._worker, requests):
            yield response


async def _serve_streams(worker: UdpWorker, started: Callable[[int], None]) -> None:
    server = grpc.aio.server()
    cluster_pb2_grpc.add_ClusterServicer_to_server(_Servicer(worker), server)
    port = server.add_insecure_port(f"{_HOST}:0")
    await server.start()
    started(port)
    await server.wait_for_termination()


def _pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})


def _work(connection: Connection, secrets: dict[str, bytes]) -> None:
    """The worker's process: tells its ports, then its CPU time whenever it is asked."""
    _pin(1)
    sums = np.random.default_rng(1).standard_normal((1, _WIDTH)).astype(np.float32)

    def compute(session: int, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        return sums

    workers = {size: UdpWorker(_HOST, 0, compute, datagram_bytes=size) for size in (1400, 1472)}
    for session, (name, (size, _, _)) in enumerate(_KINDS.items()):
        workers[size].add_session(session, secrets[name], "benchmark")

    def started(port: int) -> None:
        connection.send(({size: worker.port for size, worker in workers.items()}, port))

    streams = threading.Thread(
        target=lambda: asyncio.run(_serve_streams(workers[1400], started)), daemon=True
    )
    streams.start()
    with suppress(EOFError):
        while connection.recv():
            connection.send(time.process_time())
    os._exit(0)  # the streams' thread has no end of its own


class _Side:
    """One kind of exchange, measured so far."""

    def __init__(self, link: Link, worker: int, exact: bool, copies: int) -> None:
        self.link = link
        self._worker = worker
        self._exact = exact
        self._copies = copies
        self._sum = np.zeros(_WIDTH, np.float32)
        self.seconds: list[float] = []
        self.cpu = [0.0, 0.0]

    def exchange(self, step: int, layer: int, inputs: bytes) -> float:
        started = time.perf_counter()
        link, total = self.link, self._sum
        link.send(
            self._worker,
            step,
            layer,
            1,
            inputs,
            plan=1,
            exact=self._exact,
            copies=self._copies,
            n_values=_WIDTH,
        )
        missing = _WIDTH
        while missing:
            answer = link.receive(1.0)
            if answer is None:
                raise TimeoutError("an exchange was lost on loopback")
            values = answer.values
            total[answer.first : answer.first + len(values)] += values
            missing -= len(values)
        return time.perf_counter() - started

    def figures(self) -> dict[str, float]:
        """Of one exchange; bytes with the headers and tags of ours."""
        microseconds = np.array(self.seconds) * 1e6
        middle, p10, p99 = np.percentile(microseconds, [50, 10, 99])
        counts = self.link.statistics(self._worker)
        exchanges = len(self.seconds) + _EXCHANGES  # with those of the first step
        return {
            "round_trip_us_p10": round(float(p10), 1),
            "round_trip_us_p50": round(float(middle), 1),
            "round_trip_us_p99": round(float(p99), 1),
            "coordinator_cpu_us": round(self.cpu[0] / len(self.seconds) * 1e6, 1),
            "worker_cpu_us": round(self.cpu[1] / len(self.seconds) * 1e6, 1),
            "bytes_sent": round(counts.sent_bytes / exchanges),
            "bytes_received": round(counts.received_bytes / exchanges),
        }


def measure(report: Report, steps: int) -> dict[str, dict[str, float]]:
    """All kinds in turn; figures of each."""
    secrets = {name: os.urandom(32) for name in _KINDS}
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(there, secrets), daemon=True)
    process.start()
    there.close()
    _pin(0)
    ports, stream_port = here.recv()
    links = {size: UdpLink(_HOST, datagram_bytes=size) for size in ports}
    sides: dict[str, _Side] = {}
    for session, (name, (size, exact, copies)) in enumerate(_KINDS.items()):
        links[size].add_worker(session, _HOST, ports[size], session, secrets[name])
        sides[name] = _Side(links[size], session, exact, copies)
    streams = GrpcLink()
    channel = grpc.insecure_channel(f"{_HOST}:{stream_port}")
    streams.add_worker(0, channel, _STREAM_SESSION)
    sides["stream"] = _Side(streams, 0, True, 1)
    values = np.random.default_rng(2).standard_normal((1, _WIDTH)).astype(np.float32)
    inputs = encode(ActivationForm.Q8_0, values)

    def worker_cpu() -> float:
        here.send(True)
        return float(here.recv())

    for step in range(1, steps + 2):
        for side in sides.values():
            side.link.begin_step(step)
        for side in sides.values():
            theirs, ours = worker_cpu(), time.process_time()
            times = [side.exchange(step, layer, inputs) for layer in range(_EXCHANGES)]
            ours, theirs = time.process_time() - ours, worker_cpu() - theirs
            if step > 1:  # the first is for the caches, and opens the stream
                side.seconds += times
                side.cpu = [side.cpu[0] + ours, side.cpu[1] + theirs]
    figures = {name: side.figures() for name, side in sides.items()}
    streams.close()
    channel.close()
    for link in links.values():
        link.close()
    here.send(False)
    process.join()
    return figures


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="30 steps of each kind, not 400")
    steps = 30 if parser.parse_args().quick else 400
    report = Report("dataplane")
    figures = measure(report, steps)
    report.details.update(figures)
    for name, found in figures.items():
        report.note(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in found.items()))
    exact, stream = (figures[name]["round_trip_us_p50"] for name in ("exact", "stream"))
    report.at_most("an exact exchange over datagrams, part of one over a stream", exact / stream, 1.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
