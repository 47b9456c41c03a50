"""What stands for a contribution until it comes: nothing, or what it is on average."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.plan import Plan

Floats = NDArray[np.float32]


class Fills:
    """The calibrated mean contributions of the groups that a worker has.

    Args:
        means: (n_layers, n_groups, n_embd) mean contribution of each group.
    """

    def __init__(self, means: NDArray[np.floating]) -> None:
        self._means = means
        self._plan = -1
        self._known: dict[tuple[int, int], Floats] = {}

    def of(self, plan: Plan, layer: int, worker: int, n_rows: int) -> Floats:
        """The mean of a worker's contribution, flat (n_rows * n_embd,)."""
        if plan.number != self._plan:
            self._plan = plan.number
            self._known.clear()
        mean = self._known.get((layer, worker))
        if mean is None:
            groups = list(plan.groups[layer][worker])
            mean = self._means[layer, groups].astype(np.float32).sum(axis=0)
            self._known[layer, worker] = mean
        return mean if n_rows == 1 else np.tile(mean, n_rows)
