"""What a request has paid in quality so far, from what happened to each contribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scheduler.errors import SchedulingError
from scheduler.sync_ladder import additive_cost, lateness

if TYPE_CHECKING:
    from scheduler.patience import Response

# Before so many tokens one late answer would decide.
MINIMUM_TOKENS = 16
# Share of a layer's groups for which single layers' costs are measured: its least important half.
MEASURED_SHARE = 0.5
_SMALL = 1e-6


class Meter:
    """Adds up the predicted cost of late and lost contributions of one request.

    Costs are the calibrated ones of single layers, scaled by how much more the plan's layers were measured
    to cost together. A plain sum; one multiplication for each contribution that is not on time.

    Args:
        response: of the model.
        quality: the request's bound; the whole of it counts here, a plan uses less.
        syncs: the plan's sync boundaries.
        shares: the plan's remote share of each layer's groups.
        minimum_tokens: tokens before it judges.

    Raises:
        SchedulingError: `quality` or the number of shares is wrong.
    """

    def __init__(
        self,
        response: Response,
        quality: float,
        syncs: tuple[int, ...],
        shares: Sequence[float],
        minimum_tokens: int = MINIMUM_TOKENS,
    ) -> None:
        if not 0 < quality <= 1:
            raise SchedulingError(f"quality is {quality}; it must be above 0 and at most 1")
        if len(shares) != response.n_layers:
            raise SchedulingError(f"{len(shares)} shares for {response.n_layers} layers")
        self.bound = -math.log(quality)
        self.tokens = 0
        self._minimum = minimum_tokens
        self._finished = 0.0
        self._current = 0.0
        n_late = response.late_cost.shape[1]
        together, mean_share = _together(response, syncs, shares)
        self._late: list[list[float]] = []
        self._lost: list[float] = []
        for layer, share in enumerate(shares):
            # Layers that the plan does not cut can not be late; should one be, it counts as half of it.
            held = share if share > 0 else MEASURED_SHARE
            alone = response.share_factor(held)
            factor = together if held <= mean_share else max(together, alone)
            lost = max(float(response.lost_cost[layer]), 0.0) * alone / held
            costs = [additive_cost(response.late_cost, layer, late) for late in range(n_late + 1)]
            self._lost.append(lost)
            self._late.append([cost * factor / held if cost < math.inf else lost for cost in costs])

    def late(self, layer: int, share: float, by: int) -> None:
        """A share of a layer's groups was folded in `by` layers late; unmeasured, that counts as lost."""
        self._current += self.price_late(layer, share, by)

    def lost(self, layer: int, share: float) -> None:
        """A share of a layer's groups never came."""
        self._current += self.price_lost(layer, share)

    def price_late(self, layer: int, share: float, by: int) -> float:
        """What it costs a token if a share of a layer's groups is `by` layers late."""
        costs = self._late[layer]
        return share * (costs[by] if by < len(costs) else self._lost[layer])

    def price_lost(self, layer: int, share: float) -> float:
        """What it costs a token if a share of a layer's groups never comes."""
        return share * self._lost[layer]

    def end_token(self) -> None:
        """A token is finished."""
        self._finished += self._current
        self._current = 0.0
        self.tokens += 1

    @property
    def mean(self) -> float:
        """Predicted ln-ppl increase per token so far."""
        return self._finished / self.tokens if self.tokens else 0.0

    @property
    def exceeded(self) -> bool:
        """Whether the request costs more than its quality allows, and should go on exactly."""
        return self.tokens >= self._minimum and self.mean > self.bound


def _together(response: Response, syncs: tuple[int, ...], shares: Sequence[float]) -> tuple[float, float]:
    """How much more late layers cost together than the sum of each alone, and their mean remote share."""
    costs = response.late_cost
    total = weighted = 0.0
    for layer, by in enumerate(lateness(syncs, response.n_layers)):
        # What was not measured so late has come before, or counts as lost when it happens.
        known = [additive_cost(costs, layer, late) for late in range(min(by, costs.shape[1]) + 1)]
        cost = max(cost for cost in known if cost < math.inf) if shares[layer] > 0 else 0.0
        total += cost
        weighted += cost * shares[layer]
    if total <= 0:
        # Nothing is planned to be late: the slope of a small sum.
        share = max(shares, default=0.0)
        return response.increase(_SMALL, share) / _SMALL if share > 0 else 1.0, share
    return response.increase(total, weighted / total) / total, weighted / total
