"""A device of a measured cluster that can be told to answer wrongly: `cluster_node` with one more command.

It has the real parts and the real keys; only what it computes, or how it marks and seals it, is spoilt.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster_node import NodeProcess, main
from edge_runtime.cluster.exchange import Inputs
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.cluster.worker_session import Request, WorkerSession

Floats = NDArray[np.float32]
# What becomes of right sums (n_rows, n_out); the second are those of the step before, of as many rows.
Spoil = Callable[[Floats, Floats], Floats]
Answer = Callable[[WorkerSession, Request], list[bytes]]

_RANDOM = np.random.default_rng(1)


def _garbage(sums: Floats, before: Floats) -> Floats:
    """Numbers of the right size and no sense."""
    return _RANDOM.permuted(sums, axis=1)


_OF_NUMBERS: dict[str, Spoil] = {
    "garbage": _garbage,
    "old numbers": lambda sums, before: before,
    "NaN": lambda sums, before: np.full_like(sums, np.nan),
    "wrong shape": lambda sums, before: sums[:, :-32].copy(),
}


class BadWorkerProcess(NodeProcess):
    """A device whose answers to others can be spoilt."""

    def __init__(self, home: Path, address: str, values: dict[str, str]) -> None:
        super().__init__(home, address, values)
        self._spoil: Spoil | None = None
        self._right_answer: Answer | None = None
        self._before: dict[int, Floats] = {}  # last row of the right sums of each layer's last request

    async def spoil(self, command: dict[str, Any]) -> dict[str, Any]:
        """Answer wrongly from now on; ``how`` is a name, None for rightly.

        ``old steps`` marks answers with the step before; ``wrong key`` seals them with one that nobody has.
        """
        how = command["how"]
        udp: Any = self._udp()
        self._spoil = _OF_NUMBERS.get(how)
        assert self._right_answer is not None
        udp._answer = self._right_answer
        if how == "old steps":
            udp._answer = _of_old_steps(self._right_answer)
        if how == "wrong key":
            for number, session in udp._sessions.items():
                udp.add_session(number, os.urandom(32), session.peer)
        return {}

    async def _start(self) -> None:
        await super()._start()
        udp = self._udp()
        right = udp.compute
        self._right_answer = udp._answer

        def compute(session: int, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
            sums = right(session, plan, layer, n_rows, inputs)
            before = np.broadcast_to(self._before.get(layer, sums[-1]), sums.shape)
            self._before[layer] = sums[-1].copy()
            return sums if self._spoil is None else self._spoil(sums, np.ascontiguousarray(before))

        udp.compute = compute

    def _udp(self) -> UdpWorker:
        assert self._node is not None
        return self._node._worker._udp


def _of_old_steps(right: Answer) -> Answer:
    def answer(session: WorkerSession, request: Request) -> list[bytes]:
        request.step -= 1
        return right(session, request)

    return answer


if __name__ == "__main__":
    main(BadWorkerProcess)
