"""Prompts: many rows at once, over streams to the workers or all here, whichever was measured faster."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import Link
from edge_runtime.cluster.pending import Pending
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.engine.activations import encode, kernel_form
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.layer_steps import LayerSteps

Floats = NDArray[np.float32]
_Way = Literal["together", "alone"]

# The way that lost is tried again after so many batches: networks and loads change.
_TRIED_AGAIN = 64
_GAIN = 0.3
# Beyond this, and twice what the own share took, a worker is given up.
_PATIENCE = 0.5


class Prefill:
    """Computes batches of prompt tokens.

    Args:
        link: to the same workers as the coordinator's, over streams.
    """

    def __init__(self, shape: PartitionShape, link: Link) -> None:
        self._link = link
        self._forms = [kernel_form(gate) for gate, _, _ in shape.types]
        self._seconds_a_row: dict[_Way, float] = {}
        self._batches = 0

    def run(
        self, step: int, steps: LayerSteps, shares: PlanShares, x: Floats, asked: Collection[int]
    ) -> set[int]:
        """Bring the residual stream `x` (n_rows, n_embd) through all layers, in place.

        Args:
            asked: workers that may be asked.

        Returns:
            workers that did not answer in time; what they owed was computed here.
        """
        way = self._way() if asked and any(shares.workers) else "alone"
        started = time.perf_counter()
        failed: set[int] = set()
        self._step = step
        self._link.begin_step(self._step)
        for layer in range(len(shares.own)):
            workers = [
                w for w in shares.workers[layer] if way == "together" and w in asked and w not in failed
            ]
            failed |= self._layer(steps, shares, layer, x, workers)
        if not failed:
            seconds = (time.perf_counter() - started) / len(x)
            known = self._seconds_a_row.get(way, seconds)
            self._seconds_a_row[way] = known + _GAIN * (seconds - known)
        return failed

    def _way(self) -> _Way:
        self._batches += 1
        ways: tuple[_Way, _Way] = ("together", "alone")
        for way in ways:
            if way not in self._seconds_a_row:
                return way
        better = min(ways, key=lambda way: self._seconds_a_row[way])
        other = ways[better == "together"]
        # A way that takes twice as long is not worth another look.
        close = self._seconds_a_row[other] < 2 * self._seconds_a_row[better]
        return other if close and self._batches % _TRIED_AGAIN == 0 else better

    def _layer(
        self, steps: LayerSteps, shares: PlanShares, layer: int, x: Floats, workers: list[int]
    ) -> set[int]:
        residual, ffn_input = steps.attention(layer, x)
        np.copyto(x, residual)
        started = time.perf_counter()
        pending: dict[int, Pending] = {}
        if workers:
            content, inputs = encode(self._forms[layer], ffn_input), ffn_input.copy()
            for worker in workers:
                part = shares.share_of(layer, worker)
                pending[worker] = Pending(layer, worker, x.reshape(-1), inputs, started, np.inf, part)
                self._link.send(
                    worker, self._step, layer, len(x), content, plan=shares.plan.number, n_values=x.size
                )
        shares.compute_own(layer, ffn_input, x)
        for worker in shares.workers[layer]:
            if worker not in pending:
                x += shares.compute(layer, worker, ffn_input)
        now = time.perf_counter()
        limit = now + 2 * (now - started) + _PATIENCE
        while pending and now < limit:
            answer = self._link.receive(limit - now)
            now = time.perf_counter()
            if answer is None:
                if self._link.take_refusals():
                    break
                continue
            waiting = pending.get(answer.worker)
            if waiting is not None and (answer.step, answer.layer) == (self._step, layer):
                waiting.fold(answer.first, answer.values, answer.fragment, answer.n_fragments)
                if waiting.complete:
                    del pending[answer.worker]
        for worker, waiting in pending.items():
            waiting.complete_with(shares.compute(layer, worker, waiting.inputs))
        return set(pending)
