"""Water-filling: how many groups each node gets so that a token ends soonest, before rounding.

Layers are of two kinds: local ones, which the coordinator computes alone, and remote ones, which are cut the
same way each. A remote layer costs a round trip, so where memory forces groups out and links are slow, few
layers are remote and most of each is; where links are quick, all layers are, and each is balanced. With
memory shared evenly between the remote layers the time is a convex function of the coordinator's own groups,
and for these the least time is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.timing import Floats, Mode, TimeModel
from scheduler.waiting import expected_largest

_BISECTIONS = 16
_GRID = np.linspace(0.0, 1.0, 7)
# Numbers of remote layers that are tried.
_LAYER_CHOICES = 8


@dataclass(frozen=True, slots=True)
class Filling:
    """A cut in real numbers.

    Attributes:
        nodes: the workers used, indices from 0.
        remote_layers: layers that are cut.
        own: the coordinator's groups of a remote layer.
        shares: each used worker's groups of a remote layer.
        seconds: of all layers of a token, about.
    """

    nodes: tuple[int, ...]
    remote_layers: int
    own: float
    shares: tuple[float, ...]
    seconds: float


def layer_choices(time: TimeModel, own_room: int) -> list[int]:
    """Numbers of remote layers worth trying, where the coordinator has room for `own_room` groups."""
    model = time.model
    needed = model.n_layers * model.n_groups - own_room
    least = max(1, -(-needed // model.n_groups))
    if least > model.n_layers:
        return []
    spread = np.geomspace(1, model.n_layers - least + 1, _LAYER_CHOICES)
    return sorted({least - 1 + round(step) for step in spread.tolist()})


def fill(
    time: TimeModel,
    nodes: Sequence[int],
    room: Sequence[int],
    mode: Mode,
    run_length: float = 1.0,
    layers: Sequence[int] | None = None,
    most_remote: float = 1.0,
    *,
    least_remote: float = 0.0,
    quick: bool = False,
) -> list[Filling]:
    """The best cut for each number of remote layers, fastest first.

    Args:
        nodes: workers to use, indices from 0.
        room: groups that the coordinator and each of all workers may hold over all layers.
        run_length: remote layers between two syncs.
        layers: numbers of remote layers; `layer_choices` where None.
        most_remote, least_remote: of each remote layer's groups, as a share.
        quick: within a few per cent only.
    """
    model = time.model
    choices = layer_choices(time, room[0]) if layers is None else list(layers)
    if quick:
        choices = choices[:: max(1, len(choices) - 1)]
    if not choices or not nodes:
        return []
    n_remote = np.array(choices, dtype=np.float64)
    chosen = np.array(nodes, dtype=np.intp)
    held = np.array([room[1 + index] for index in nodes], dtype=np.float64)
    caps = np.minimum(held[None, :] / n_remote[:, None], model.n_groups)  # (choices, nodes)
    local = (model.n_layers - n_remote) * model.n_groups
    most_own = np.clip((room[0] - local) / n_remote, 0.0, (1 - least_remote) * model.n_groups)
    least_own = np.maximum(model.n_groups - caps.sum(axis=1), (1 - most_remote) * model.n_groups)
    runs = n_remote / run_length
    possible = (room[0] >= local) & (least_own <= most_own + 1e-9)
    if not possible.any():
        return []
    n_remote, caps, runs = n_remote[possible], caps[possible], runs[possible]
    low, high = np.maximum(least_own[possible], 0.0), most_own[possible]
    problem = _Problem(time, chosen, mode, run_length, 12 if quick else _BISECTIONS)
    rows = np.arange(len(n_remote))
    # Where memory leaves no choice, one look is enough.
    passes, grid = (2 if quick else 3, _GRID) if (high - low > 1e-6).any() else (1, _GRID[:1])
    for _ in range(passes):
        own = low[:, None] + (high - low)[:, None] * grid  # (choices, grid)
        seconds = problem.least(own, caps)
        best = np.argmin(seconds, axis=1)
        low = own[rows, np.maximum(best - 1, 0)]
        high = own[rows, np.minimum(best + 1, len(grid) - 1)]
    own_best, ends = own[rows, best], seconds[rows, best]
    shares = problem.shares(ends[:, None], own_best[:, None], caps)[:, 0, :]
    local_layer = time.attention + model.n_groups * time.own_group
    totals = runs * ends + (model.n_layers - n_remote) * local_layer
    found = [
        Filling(tuple(nodes), int(n_remote[row]), float(own_best[row]), tuple(shares[row].tolist()), total)
        for row, total in enumerate(totals.tolist())
    ]
    return sorted(found, key=lambda filling: filling.seconds)


class _Problem:
    """Time of one run of remote layers for numbers of the coordinator's own groups."""

    def __init__(
        self, time: TimeModel, nodes: NDArray[np.intp], mode: Mode, run_length: float, bisections: int
    ) -> None:
        self._bisections = bisections
        self._length = run_length
        self._n_groups = time.model.n_groups
        self._own_group = time.own_group
        self._before = time.attention + time.overhead + float(time.exchange_overhead[nodes].sum())
        missing = time.missing[nodes]
        mean_missing = 1.0 - float(np.prod(1.0 - missing))
        slack = float(time.slack[nodes].mean())
        travel = time.outward[nodes] + time.back[nodes] + time.jitter[nodes] * expected_largest(len(nodes))
        # Once more the whole exchange in exact mode, the time up to the deadline in relaxed mode.
        lost = mean_missing * (slack if mode == "relaxed" else slack + float(travel.mean()))
        self._fixed: Floats = travel + lost + time.share_overhead[nodes]
        self._share_overhead: Floats = time.share_overhead[nodes]
        self._queue: Floats = self._fixed + (run_length - 1) * self._share_overhead
        self._group: Floats = time.group[nodes]
        self._per_second: Floats = 1.0 / self._group

    def shares(self, ends: Floats, own: Floats, caps: Floats) -> Floats:
        """Groups that each worker finishes by `ends` (choices, grid): (choices, grid, nodes)."""
        last = (self._length - 1) * (self._before + own * self._own_group) + self._before
        groups: Floats = (ends - last)[:, :, None] - self._fixed
        if self._length > 1:
            queued = (ends - self._before)[:, :, None] - self._queue
            queued /= self._length
            np.minimum(groups, queued, out=groups)
        groups *= self._per_second
        np.maximum(groups, 0.0, out=groups)
        np.minimum(groups, caps[:, None, :], out=groups)
        return groups

    def least(self, own: Floats, caps: Floats) -> Floats:
        """The least time of a run, (choices, grid)."""
        needed = self._n_groups - own
        layer = self._before + own * self._own_group
        low: Floats = self._length * layer
        slowest = self._length * (self._share_overhead + caps * self._group) + self._fixed
        high: Floats = low + slowest.max(axis=1)[:, None]
        for _ in range(self._bisections):
            middle = (low + high) / 2
            enough = self.shares(middle, own, caps).sum(axis=2) >= needed - 1e-9
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        return high
