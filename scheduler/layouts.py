"""Which layers are spread, and at which boundaries their contributions are waited for.

A remote layer saves the coordinator time (and memory), a wait costs time, a contribution that is not waited
for comes some layers late and costs quality. A layer right before a sync is never late, so all of it may be
remote; others leave the coordinator what matters most. For given prices of quality and of memory the best
choice is found by dynamic programming over the last sync boundary; a range of prices gives layouts to choose
from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.sync_ladder import Floats

# What cannot be allowed at any price.
_NEVER = 1e6
# Prices of quality, in units of one wait for the whole allowance.
_QUALITY_PRICES = np.geomspace(0.05, 50.0, 11)
# Prices of a layer's memory, in units of one wait.
_MEMORY_PRICES = np.array([0.0, 0.1, 0.3, 1.0, 3.0, 30.0])
# With more layers every second price is tried, so that a plan stays a matter of a tenth of a second.
_MANY_LAYERS = 40


@dataclass(frozen=True, slots=True)
class Layout:
    """Remote layers and sync boundaries.

    Attributes:
        remote: layers of which a part is remote, rising.
        full: layers all of whose groups are remote, rising; none of them in `remote`.
        syncs: rising boundaries, the last n_layers.
    """

    remote: tuple[int, ...]
    full: tuple[int, ...]
    syncs: tuple[int, ...]

    @property
    def cut(self) -> tuple[int, ...]:
        """Layers with remote groups, rising."""
        return tuple(sorted((*self.remote, *self.full)))

    @property
    def run_length(self) -> float:
        """Layers with remote groups between two syncs that have any, in the mean."""
        starts = (0, *self.syncs[:-1])
        layers = np.array(self.cut)
        runs = [((layers >= a) & (layers < b)).any() for a, b in zip(starts, self.syncs, strict=True)]
        return len(layers) / max(sum(runs), 1)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What kinds of layers cost.

    Attributes:
        n_groups: neuron groups of a layer.
        remote: of these, remote in a layer of which a part is remote.
        local_layer, remote_layer, full_layer: the coordinator's seconds, waits left out.
        wait, full_wait: seconds that a sync right behind a remote or a full layer costs.
    """

    n_groups: int
    remote: float
    local_layer: float
    remote_layer: float
    full_layer: float
    wait: float
    full_wait: float

    def judge(self, layout: Layout, table: Floats) -> tuple[float, float, float]:
        """Seconds of all layers, sum of single layers' costs, and remote groups of a layout."""
        n_layers = layout.syncs[-1]
        seconds = (n_layers - len(layout.cut)) * self.local_layer
        seconds += len(layout.remote) * self.remote_layer + len(layout.full) * self.full_layer
        additive, start, full = 0.0, 0, set(layout.full)
        for sync in layout.syncs:
            here = [layer for layer in layout.cut if start <= layer < sync]
            if here:
                additive += sum(float(table[layer, sync - 1 - layer]) for layer in here)
                wait = self.full_wait if here[-1] in full else self.wait
                seconds += max(0.0, wait - (sync - 1 - here[-1]) * self.local_layer)
            start = sync
        return seconds, additive, len(layout.remote) * self.remote + len(layout.full) * self.n_groups


def even_layout(n_layers: int, n_remote: int) -> Layout:
    """Remote layers that lie evenly; a sync after every layer."""
    remote = tuple((2 * number + 1) * n_layers // (2 * n_remote) for number in range(n_remote))
    return Layout(remote, (), tuple(range(1, n_layers + 1)))


def late_table(late_cost: Floats, most_late: int) -> Floats:
    """(n_layers, n_layers) cost of each layer when the next sync is so many layers behind it.

    Args:
        late_cost: (n_layers, K), as in `scheduler.patience.Response`.
        most_late: layers after which a contribution has come by itself.
    """
    n_layers = late_cost.shape[0]
    measured = np.where(np.isfinite(late_cost), np.clip(late_cost, 0.0, _NEVER), _NEVER)
    costs = np.concatenate([np.zeros((n_layers, 1)), measured, np.full((n_layers, 1), _NEVER)], axis=1)
    late = np.minimum(np.arange(n_layers), most_late)
    table: Floats = costs[:, np.minimum(late, costs.shape[1] - 1)]
    # Nothing is later than the end of the token.
    table[np.arange(n_layers)[:, None] + np.arange(n_layers) >= n_layers] = 0.0
    return table


def layouts(table: Floats, times: LayerTimes, allowance: float) -> list[Layout]:
    """Layouts that are best for some price of quality and of memory.

    Args:
        table: of `late_table`, scaled to the share that is remote.
        allowance: ln-perplexity increase that is allowed.
    """
    n_layers = table.shape[0]
    step = 2 if n_layers > _MANY_LAYERS else 1
    prices = _QUALITY_PRICES[::step] * times.wait / max(allowance, 1e-9)
    memory = _MEMORY_PRICES[::step] * max(times.wait, times.local_layer) / times.n_groups
    quality, price = (grid.ravel() for grid in np.meshgrid(prices, memory, indexing="ij"))
    columns = np.arange(len(quality))
    part = times.remote_layer - times.local_layer - price * times.remote
    all_ = times.full_layer - times.local_layer - price * times.n_groups + times.full_wait - times.wait
    waits = np.maximum(times.wait - np.arange(n_layers) * times.local_layer, 0.0)
    best = np.zeros((n_layers + 1, len(quality)))
    starts = np.zeros((n_layers + 1, len(quality)), dtype=np.intp)
    lasts = np.zeros_like(starts)
    gains: list[Floats] = []
    for sync in range(1, n_layers + 1):
        layers = np.arange(sync)
        gain = table[layers, sync - 1 - layers][:, None] * quality + part
        gain[-1] = np.minimum(gain[-1], all_)
        np.minimum(gain, 0.0, out=gain)
        gains.append(gain)
        sums = np.concatenate([np.zeros((1, len(quality))), np.cumsum(gain, axis=0)])
        ends = sums[1:] + waits[sync - 1 - layers][:, None]  # by the last remote layer
        nearest = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
        reached = best[:sync] + np.minimum(nearest - sums[:-1], 0.0)
        start = starts[sync] = np.argmin(reached, axis=0)
        best[sync] = reached[start, columns]
        idle = nearest[start, columns] >= sums[start, columns]
        ends[layers[:, None] < start] = np.inf
        lasts[sync] = np.where(idle, -1, np.argmin(ends, axis=0))
    found: set[Layout] = set()
    known: set[tuple[float, tuple[tuple[int, int, int], ...]]] = set()
    full_pays = all_ < part
    for column in columns.tolist():
        chain = _walk_back(starts[:, column].tolist(), lasts[:, column].tolist())
        # With many layers those that lead to the same waits stand for each other.
        if step > 1 and (float(price[column]), chain) in known:
            continue
        known.add((float(price[column]), chain))
        found.add(_layout(chain, column, gains, bool(full_pays[column])))
    return sorted((layout for layout in found if layout.cut), key=lambda layout: (layout.cut, layout.syncs))


def _walk_back(starts: list[int], lasts: list[int]) -> tuple[tuple[int, int, int], ...]:
    """(start, last remote layer, sync) of each run that has a remote layer, the last run first."""
    runs = []
    sync = len(starts) - 1
    while sync > 0:
        if lasts[sync] >= 0:
            runs.append((starts[sync], lasts[sync], sync))
        sync = starts[sync]
    return tuple(runs)


def _layout(
    chain: tuple[tuple[int, int, int], ...], column: int, gains: list[Floats], full_pays: bool
) -> Layout:
    """The layout of one pair of prices; `full_pays`: a layer right before a sync is better all remote."""
    remote: list[int] = []
    full: list[int] = []
    syncs = {len(gains)}
    for start, last, sync in chain:
        here = (start + (gains[sync - 1][start : last + 1, column] < 0).nonzero()[0]).tolist()
        if full_pays and here and here[-1] == sync - 1:
            full.append(here.pop())
        remote += here
        syncs.add(sync)
    return Layout(tuple(sorted(remote)), tuple(sorted(full)), tuple(sorted(syncs)))
