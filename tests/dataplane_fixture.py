"""Both ends of the data plane on loopback, and a relay between them that loses what it is told to lose."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import Answer, Inputs, Link
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker

Floats = NDArray[np.float32]

HOST = "127.0.0.1"
SESSION = 7
WIDTH = 2048
PATIENCE = 10.0  # seconds; only failing tests wait so long


def sums_of(plan: int, layer: int, n_rows: int, inputs: Inputs, width: int = WIDTH) -> Floats:
    """What the workers of these tests compute: something that depends on all they were given."""
    seed = np.frombuffer(inputs, np.uint8).sum(dtype=np.int64) + plan * 1000 + layer
    return np.random.default_rng(int(seed)).standard_normal((n_rows, width)).astype(np.float32)


class Computing:
    """A `Compute` that notes its calls, can be held up, and fails where it is told to."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self.calls: list[tuple[int, int, int]] = []  # session, plan, layer
        self.threads: set[int] = set()
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.instead: Callable[[int, Floats], Floats] | None = None

    def __call__(self, session: int, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        self.calls.append((session, plan, layer))
        self.threads.add(threading.get_ident())
        self.started.release()
        assert self.gate.wait(PATIENCE)
        sums = sums_of(plan, layer, n_rows, inputs, self.width)
        return sums if self.instead is None else self.instead(layer, sums)

    @property
    def layers(self) -> list[int]:
        return [layer for _, _, layer in self.calls]


@contextmanager
def connected(computing: Computing, **options: int) -> Iterator[tuple[UdpLink, UdpWorker]]:
    """A link and its worker 1."""
    worker = UdpWorker(HOST, 0, computing, **options)
    link = UdpLink(HOST, **options)
    try:
        join(link, worker, worker.port)
        link.begin_step(1)
        yield link, worker
    finally:
        computing.gate.set()
        link.close()
        worker.stop()


def join(link: UdpLink, worker: UdpWorker, port: int, number: int = 1, session: int = SESSION) -> bytes:
    """Make a worker one of the link's, behind a port; returns the session's secret."""
    secret = os.urandom(32)
    worker.add_session(session, secret, "coordinator")
    link.add_worker(number, HOST, port, session, secret)
    return secret


def collect(link: Link, total: int = WIDTH, *, layers: int = 1) -> dict[tuple[int, int], Floats]:
    """Whole answers by (worker, layer), as soon as there are so many."""
    found: dict[tuple[int, int], Floats] = {}
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        answer = link.receive(0.05)
        if answer is not None:
            put(found, answer, total)
            if len(found) == layers and not any(np.isnan(values).any() for values in found.values()):
                return found
    raise AssertionError(f"only {sorted(found)} came; {link.take_refusals()}")


def put(found: dict[tuple[int, int], Floats], answer: Answer, total: int) -> None:
    target = found.setdefault((answer.worker, answer.layer), np.full(total, np.nan, np.float32))
    part = slice(answer.first, answer.first + len(answer.values))
    assert np.isnan(target[part]).all(), "a fragment came twice"
    target[part] = answer.values


def nothing_comes(link: Link, seconds: float = 0.1) -> bool:
    """Whether no answer comes for a while; the link works off what does come."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if link.receive(left) is not None:
            return False
    return True


def until(claim: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not claim():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.002)


class Relay:
    """Forwards datagrams between a link and a worker.

    Args:
        keep: (to the worker?, number of the datagram in its direction) -> whether it is forwarded.
    """

    def __init__(self, port: int, keep: Callable[[bool, int], bool]) -> None:
        self._target = (HOST, port)
        self._keep = keep
        self._front = self._bound()
        self.back = self._bound()
        self._client: tuple[str, int] | None = None
        self._counts = [0, 0]
        self._stopping = False
        self.port: int = self._front.getsockname()[1]
        self._threads = [
            threading.Thread(target=self._forward, args=(to_worker,), daemon=True) for to_worker in (0, 1)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        made.settimeout(0.05)
        made.bind((HOST, 0))
        return made

    def _forward(self, to_worker: int) -> None:
        while not self._stopping:
            try:
                content, sender = (self._front if to_worker else self.back).recvfrom(65_535)
            except OSError:
                continue
            number = self._counts[to_worker]
            self._counts[to_worker] += 1
            if to_worker:
                self._client = sender
            if self._keep(bool(to_worker), number):
                if to_worker:
                    self.back.sendto(content, self._target)
                elif self._client is not None:
                    self._front.sendto(content, self._client)

    def move(self) -> None:
        """Reach the worker from another port from now on, as behind a router that forgot the connection."""
        old, self.back = self.back, self._bound()
        old.close()

    def close(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._front.close()
        self.back.close()
