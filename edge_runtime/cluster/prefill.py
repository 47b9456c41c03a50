"""Prompts: many rows at once, over streams to the workers or all here, whichever was measured faster."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import MAX_ROWS, Link
from edge_runtime.cluster.grpc_worker import MOST_SUM_BYTES
from edge_runtime.cluster.pending import Pending
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.prepared_adapters import TokenAdapters
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
# A row of a contribution is held against one computed here, which sums in another order.
_TOLERANCE = 1e-3


class Outcome(NamedTuple):
    """Workers that did their part badly; it was computed here.

    Attributes:
        failed: that did not answer in time, or refused.
        wrong: whose contribution was not right, and how.
    """

    failed: set[int]
    wrong: dict[int, str]


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
        self,
        step: int,
        steps: LayerSteps,
        shares: PlanShares,
        x: Floats,
        asked: Collection[int],
        checked: Collection[int],
        adapters: TokenAdapters,
    ) -> Outcome:
        """Bring the residual stream `x` (n_rows, n_embd) through all layers, in place.

        Args:
            asked: workers that may be asked.
            checked: those of them of whose contributions to all layers a row is compared; of the others' to
                one layer.
            adapters: that the rows are computed with.
        """
        most_bytes = x.nbytes + 4 * len(x) * adapters.widest
        fits = len(x) <= MAX_ROWS and most_bytes <= MOST_SUM_BYTES
        way = self._way() if fits and asked and any(shares.workers) else "alone"
        started = time.perf_counter()
        self._outcome = outcome = Outcome(set(), {})
        self._step, self._adapters = step, adapters
        self._link.begin_step(self._step)
        for layer in range(len(shares.own)):
            able = [w for w in shares.workers[layer] if w in asked and way == "together"]
            workers = [w for w in able if w not in outcome.failed and w not in outcome.wrong]
            spot = self._batches % len(shares.own) == layer
            self._layer(steps, shares, layer, x, workers, workers if spot else checked)
        if not outcome.failed and not outcome.wrong:
            seconds = (time.perf_counter() - started) / len(x)
            known = self._seconds_a_row.get(way, seconds)
            self._seconds_a_row[way] = known + _GAIN * (seconds - known)
        return outcome

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
        self,
        steps: LayerSteps,
        shares: PlanShares,
        layer: int,
        x: Floats,
        workers: list[int],
        checked: Collection[int],
    ) -> None:
        residual, ffn_input = steps.attention(layer, x)
        np.copyto(x, residual)
        started = time.perf_counter()
        values = self._adapters.values(layer, ffn_input)
        pending: dict[int, Pending] = {}
        if workers:
            content = self._adapters.content(encode(self._forms[layer], ffn_input), values)
            inputs = ffn_input.copy()
            for worker in workers:
                part = shares.share_of(layer, worker)
                pending[worker] = Pending(
                    layer,
                    worker,
                    x.reshape(-1),
                    inputs,
                    started,
                    np.inf,
                    part,
                    checked=worker in checked,
                    values=values,
                )
                self._link.send(
                    worker, self._step, layer, len(x), content, plan=shares.plan.number, n_values=x.size
                )
        shares.compute_own(layer, ffn_input, x, values)
        for worker in shares.workers[layer]:
            if worker not in pending:
                x += shares.compute(layer, worker, ffn_input, values)
        self._collect(shares, pending, started)

    def _collect(self, shares: PlanShares, pending: dict[int, Pending], started: float) -> None:
        """Wait for a layer's contributions, and compute here what does not come."""
        now = time.perf_counter()
        limit = now + 2 * (now - started) + _PATIENCE
        while pending and now < limit:
            answer = self._link.receive(limit - now)
            now = time.perf_counter()
            if answer is None:
                for refusal in self._link.take_refusals():
                    waiting = pending.get(refusal.worker)
                    if waiting is not None and (refusal.step, refusal.layer) == (self._step, waiting.layer):
                        self._fail(shares, pending.pop(refusal.worker))
                continue
            waiting = pending.get(answer.worker)
            if waiting is not None and (answer.step, answer.layer) == (self._step, waiting.layer):
                waiting.fold(answer.first, answer.values, answer.fragment, answer.n_fragments)
                if waiting.complete:
                    del pending[answer.worker]
                    self._check(shares, waiting)
        for waiting in pending.values():
            self._fail(shares, waiting)

    def _fail(self, shares: PlanShares, waiting: Pending) -> None:
        self._outcome.failed.add(waiting.worker)
        waiting.complete_with(_computed_here(shares, waiting))

    def _check(self, shares: PlanShares, waiting: Pending) -> None:
        """Hold one row of a contribution that was collected apart against one computed here."""
        if waiting.apart is None:
            return
        row = (self._step + waiting.layer) * 7919 % len(waiting.inputs)  # another each time
        values = waiting.values[row : row + 1] if waiting.values is not None else None
        own = shares.compute(waiting.layer, waiting.worker, waiting.inputs[row : row + 1], values)[0]
        difference = float(np.abs(waiting.apart.reshape(len(waiting.inputs), -1)[row] - own).max())
        if difference <= _TOLERANCE * max(float(np.abs(own).max()), 1e-6):
            waiting.settle()
            return
        self._outcome.wrong[waiting.worker] = (
            f"its contribution of layer {waiting.layer} to a prompt differs by {difference:.3g} from the "
            "right one"
        )
        waiting.complete_with(_computed_here(shares, waiting))


def _computed_here(shares: PlanShares, waiting: Pending) -> Floats:
    return shares.compute(waiting.layer, waiting.worker, waiting.inputs, waiting.values)
