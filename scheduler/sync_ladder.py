"""Where to wait: for each number of sync boundaries, those that are predicted to harm least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulingError

Floats = NDArray[np.float64]
# Breaks ties between equal costs in favour of runs of equal length.
_EVENNESS = 1e-12


def check_syncs(syncs: tuple[int, ...], n_layers: int) -> None:
    """Raise where `syncs` are not rising boundaries of 1..n_layers that end with n_layers.

    Raises:
        SchedulingError: they are not.
    """
    rising = all(a < b for a, b in zip((0, *syncs), syncs, strict=False))
    if not syncs or not rising or syncs[-1] != n_layers:
        raise SchedulingError(f"sync boundaries {syncs} must rise from 1 or more to {n_layers}")


def lateness(syncs: tuple[int, ...], n_layers: int) -> list[int]:
    """By how many layers each layer's contribution is late where it comes at its next sync boundary only."""
    check_syncs(syncs, n_layers)
    late, start = [], 0
    for sync in syncs:
        late += [sync - 1 - layer for layer in range(start, sync)]
        start = sync
    return late


def additive_cost(late_cost: Floats, layer: int, late: int) -> float:
    """Cost of one layer's contribution `late` layers late; infinite beyond what was measured."""
    if late == 0:
        return 0.0
    if late > late_cost.shape[1]:
        return float("inf")
    cost = float(late_cost[layer, late - 1])
    # Measurements scatter around zero; no layer is credited for being late.
    return max(cost, 0.0) if np.isfinite(cost) else float("inf")


def run_costs(late_cost: Floats, n_layers: int) -> Floats:
    """costs[a, b]: layers a..b-1, all late until boundary b; infinite where a >= b."""
    costs = np.full((n_layers + 1, n_layers + 1), np.inf)
    for end in range(1, n_layers + 1):
        total = 0.0
        for layer in range(end - 1, -1, -1):
            late = end - 1 - layer
            total += additive_cost(late_cost, layer, late) + _EVENNESS * late
            costs[layer, end] = total
    return costs


def ladder(late_cost: Floats, n_layers: int) -> list[tuple[int, ...]]:
    """For each number of syncs from n_layers down, the set with the smallest sum of predicted costs.

    Dynamic programming over the last run of layers between two syncs. A layer l whose next sync boundary is
    s counts as s - 1 - l layers late.

    Args:
        late_cost: (n_layers, K), ln-perplexity increase of one layer late by 1..K; later costs infinity,
            and so does what is not finite.

    Returns:
        Rising sync sets that contain n_layers; numbers for which no set has a finite cost are left out.

    Raises:
        SchedulingError: the shape is wrong.
    """
    late_cost = np.asarray(late_cost, dtype=np.float64)
    if n_layers < 1 or late_cost.ndim != 2 or late_cost.shape[0] != n_layers:
        raise SchedulingError(f"late costs of shape {late_cost.shape} do not fit {n_layers} layers")
    costs = run_costs(late_cost, n_layers)
    best = np.full(n_layers + 1, np.inf)
    best[0] = 0.0
    starts: list[NDArray[np.intp]] = []
    found: list[tuple[int, ...]] = []
    for _ in range(n_layers):
        reached = best[:, None] + costs  # (start of the last run, its end)
        start = np.argmin(reached, axis=0)
        best = reached[start, np.arange(n_layers + 1)]
        starts.append(start)
        if np.isfinite(best[n_layers]):
            found.append(_walk_back(starts, n_layers))
    return found[::-1]


def _walk_back(starts: list[NDArray[np.intp]], n_layers: int) -> tuple[int, ...]:
    syncs, end = [], n_layers
    for start in reversed(starts):
        syncs.append(end)
        end = int(start[end])
    return tuple(reversed(syncs))
