"""How long layers may do without what others compute for them: from calibrated costs and one number.

The cost of a contribution that is late or lost is an increase of the logarithm of the perplexity (ln-ppl),
measured on a text. ``quality`` is the bound that a user sets: 0.99 means a perplexity at most 1 % worse,
an increase of at most -ln(0.99).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scheduler.errors import SchedulingError
from scheduler.meter import MEASURED_SHARE
from scheduler.meter import Meter as Meter
from scheduler.sync_ladder import Floats, additive_cost, check_syncs
from scheduler.sync_ladder import ladder as ladder
from scheduler.sync_ladder import lateness as lateness

# Part of the bound that a plan may use up; the rest is for text unlike the one it was calibrated on.
HEAD_ROOM = 0.8


@dataclass(frozen=True, slots=True)
class Rung:
    """What one sync set was measured to cost.

    Attributes:
        syncs: the boundaries.
        shares: shares of each layer's groups, the least important ones, that are remote; rising.
        increases: measured ln-ppl increase for each share, everything remote coming at its next sync.
    """

    syncs: tuple[int, ...]
    shares: tuple[float, ...]
    increases: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Response:
    """How a model's perplexity answers to late and lost contributions.

    Attributes:
        n_layers: layers of the model that was measured.
        late_cost: (n_layers, K) ln-ppl increase when the least important half of one layer's groups is late
            by 1..K layers; not finite where a layer has not so many after it.
        lost_cost: (n_layers,) the same, when they never come.
        rungs: sync sets that were measured as a whole.

    Raises:
        SchedulingError: the parts do not fit together.
    """

    n_layers: int
    late_cost: Floats
    lost_cost: Floats
    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.late_cost.ndim != 2 or self.late_cost.shape[0] != self.n_layers:
            raise SchedulingError(f"late costs {self.late_cost.shape} do not fit {self.n_layers} layers")
        if self.lost_cost.shape != (self.n_layers,) or not np.all(np.isfinite(self.lost_cost)):
            raise SchedulingError(f"lost costs {self.lost_cost.shape} must be {self.n_layers} finite numbers")
        for rung in self.rungs:
            check_syncs(rung.syncs, self.n_layers)
            rising = all(a < b for a, b in zip((0.0, *rung.shares), (*rung.shares, 2.0), strict=True))
            if len(rung.shares) != len(rung.increases) or not rung.shares or not rising:
                raise SchedulingError(
                    f"the rung of {len(rung.syncs)} syncs needs an increase for each rising share"
                )
            if rung.shares[-1] > 1 or not all(map(math.isfinite, rung.increases)):
                raise SchedulingError(f"rung of {len(rung.syncs)} syncs has a wrong share or increase")

    def additive(self, late: Sequence[int]) -> float:
        """Sum over layers of what each costs alone when its least important half is so many layers late."""
        return sum(additive_cost(self.late_cost, layer, by) for layer, by in enumerate(late) if by)

    def increase(self, additive: float, share: float) -> float:
        """What a sum of single layers' costs comes to when they happen together, at a remote share.

        Interpolated between the measured rungs, by their own sums; in proportion beyond the largest.
        """
        if additive <= 0 or share <= 0:
            return 0.0
        if not math.isfinite(additive):
            return math.inf
        sums, table = self._measured
        if len(sums) == 1:
            return additive * max(share / MEASURED_SHARE, 1.0)
        measured = np.maximum.accumulate(self._at_share(table, share))
        if additive > sums[-1]:
            return float(max(measured[-1] / sums[-1], 1.0) * additive)
        return float(np.interp(additive, sums, measured))

    @cached_property
    def _shares(self) -> Floats:
        """0 and every share that any rung was measured at, rising."""
        return np.array(sorted({0.0, *(share for rung in self.rungs for share in rung.shares)}))

    @cached_property
    def _measured(self) -> tuple[Floats, Floats]:
        """Sums of the rungs' single costs, rising from 0, and (rungs + 1, shares) measured increases."""
        points = []
        for rung in self.rungs:
            total = self.additive(lateness(rung.syncs, self.n_layers))
            if 0 < total < math.inf:
                row = np.interp(self._shares, (0.0, *rung.shares), (0.0, *_rising(rung)))
                points.append((total, -len(rung.syncs), row))
        points.sort(key=lambda point: point[:2])
        sums = np.array([0.0, *(total for total, _, _ in points)])
        return sums, np.stack([np.zeros(len(self._shares)), *(row for _, _, row in points)])

    def _at_share(self, table: Floats, share: float) -> Floats:
        """A row of increases for each rung at one share, interpolated."""
        above = int(np.clip(np.searchsorted(self._shares, share), 1, len(self._shares) - 1))
        low, high = self._shares[above - 1], self._shares[above]
        part = min((share - low) / (high - low), 1.0)
        column: Floats = table[:, above - 1] * (1 - part) + table[:, above] * part
        return column

    def late_increase(self, late: Sequence[int], shares: Sequence[float]) -> float:
        """ln-ppl increase when each layer's remote share is so many layers late.

        The share that decides how layers add up is the mean over late layers, weighted by their costs.
        """
        costs = [additive_cost(self.late_cost, layer, by) for layer, by in enumerate(late)]
        costs = [cost if share > 0 else 0.0 for cost, share in zip(costs, shares, strict=True)]
        total = sum(costs)
        if not 0 < total < math.inf:
            return total
        mean = sum(cost * share for cost, share in zip(costs, shares, strict=True)) / total
        return self.increase(total, mean)

    def predicted(self, syncs: tuple[int, ...], share: float) -> float:
        """ln-ppl increase when a share of every layer comes at its next sync."""
        return self.late_increase(lateness(syncs, self.n_layers), [share] * self.n_layers)

    def lost_increase(self, shares: Sequence[float]) -> float:
        """ln-ppl increase when these shares of the layers' groups never come."""
        costs = np.where(np.array(shares) > 0, np.maximum(self.lost_cost, 0.0), 0.0)
        return float(costs.sum()) * self.share_factor(max(shares, default=0.0))

    def share_factor(self, share: float) -> float:
        """What a remote share costs, as a multiple of what half of all costs; at least in proportion."""
        linear = share / MEASURED_SHARE
        sums, table = self._measured
        if len(sums) == 1:
            return linear
        half, wanted = self._at_share(table, MEASURED_SHARE), self._at_share(table, share)
        known = half > 1e-5
        return max(linear, float(np.median(wanted[known] / half[known]))) if known.any() else linear

    def syncs_for(self, remote_share: float, loss: float, quality: float) -> tuple[int, ...]:
        """The fewest sync boundaries that keep a quality.

        A rung counts as at least what any rung with more syncs was measured to cost, so that no measurement
        that came out well by chance is trusted.

        Args:
            remote_share: share of each layer's groups on workers.
            loss: share of contributions expected never to arrive within the token.
            quality: 0 to 1; 0.99 allows a perplexity 1 % worse, of which a plan uses `HEAD_ROOM`.

        Returns:
            Rising boundaries, the last n_layers. All boundaries where nothing less keeps the quality.
        """
        bound = allowance(quality) - loss * self.lost_increase([remote_share] * self.n_layers)
        best = tuple(range(1, self.n_layers + 1))
        worst = 0.0
        for rung in sorted(self.rungs, key=lambda rung: -len(rung.syncs)):
            shares, increases = (0.0, *rung.shares), (0.0, *_rising(rung))
            if remote_share > shares[-1]:
                continue
            worst = max(worst, float(np.interp(remote_share, shares, increases)))
            if worst <= bound:
                best = rung.syncs
        return best

    def resampled(self, n_layers: int) -> Response:
        """The same response for a model of another depth, by relative depth.

        A stand-in for models whose own perplexity means nothing (random weights). A layer costs what the part
        of the depth that it covers costs, so that all layers late by the same number cost the same
        altogether; sync sets are chosen anew by `ladder`, and their increases are read off `increase`.
        """
        if n_layers == self.n_layers:
            return self
        filled = _filled(self.late_cost, self.lost_cost)
        late = np.stack([_stretched(column, n_layers) for column in filled.T], axis=1)
        lost = _stretched(self.lost_cost, n_layers)
        shares = tuple(sorted({share for rung in self.rungs for share in rung.shares})) or (0.5, 1.0)
        model = Response(n_layers, late, lost, ())
        rungs = []
        for syncs in ladder(late, n_layers):
            total = model.additive(lateness(syncs, n_layers))
            rungs.append(Rung(syncs, shares, tuple(self.increase(total, share) for share in shares)))
        return Response(n_layers, late, lost, tuple(rungs))


def allowance(quality: float) -> float:
    """The ln-ppl increase that a plan may cause: `HEAD_ROOM` of -ln(quality).

    Raises:
        SchedulingError: `quality` is not above 0 and at most 1.
    """
    if not 0 < quality <= 1:
        raise SchedulingError(f"quality is {quality}; it must be above 0 and at most 1 (0.99: 1 % worse)")
    return -math.log(quality) * HEAD_ROOM


def _rising(rung: Rung) -> tuple[float, ...]:
    """Increases that never fall with the share, nor below zero."""
    return tuple(np.maximum.accumulate(np.maximum(rung.increases, 0.0)).tolist())


def _stretched(costs: Floats, n_layers: int) -> Floats:
    """Costs of layers as those of `n_layers` layers that cover the same depth; the sum stays."""
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    edges = np.linspace(0, len(costs), n_layers + 1)
    stretched: Floats = np.diff(np.interp(edges, np.arange(len(sums)), sums))
    return stretched


def _filled(late_cost: Floats, lost_cost: Floats) -> Floats:
    """Late costs with guesses for what could not be measured, where too few layers follow.

    A layer is taken to cost no more when it is later than could be measured; the last layer, which is never
    late, what the one before it costs.
    """
    filled = np.array(late_cost, dtype=np.float64)
    for layer in range(filled.shape[0]):
        for late in range(filled.shape[1]):
            if not np.isfinite(filled[layer, late]):
                if late:
                    filled[layer, late] = filled[layer, late - 1]
                else:
                    filled[layer, late] = filled[layer - 1, late] if layer else lost_cost[layer]
    return np.maximum(filled, 0.0)
