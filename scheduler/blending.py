"""Which row each layer gets where every layer is waited for: layers then differ in nothing but their rows.

The time of a token is the sum of its rows' times, and only memory ties layers together. So a few rows are
made beforehand, among them the fastest for each share of the coordinator and each promising set of workers,
and the best sum of them within memory is looked for by exchanging two at a time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.timing import Counts, Floats, Mode, TimeModel

# All rows are taken where there are no more of them than this.
_ALL_ROWS = 200
_MOST_ROWS = 160
# Choices of rows times nodes, which an exchange looks at.
_MOST_WORK = 400_000
# Shares of the coordinator that are tried for each set of workers.
_OWN_SHARES = 9
# Numbers compared altogether, about 50 ms.
_BUDGET = 40_000_000


def blend(
    time: TimeModel,
    mode: Mode,
    start: Counts,
    node_sets: Iterable[Sequence[int]],
    room: Sequence[int],
    most_exchanged: int = 3,
) -> Counts:
    """A cut at least as fast as `start`, its rows spread evenly over the layers.

    Args:
        start: (n_layers, 1 + n_workers) groups, within memory.
        node_sets: sets of workers, indices from 0, the most promising first.
        room: groups that each node may hold over all layers.
        most_exchanged: rows that are exchanged at once; the time grows with its power.
    """
    rows = _rows(time, start, node_sets)
    seconds = np.array([time.run_seconds(row[None, :], mode) for row in rows])
    held = np.array([int((start == row).all(axis=1).sum()) for row in rows])
    held = _exchange(rows, seconds, held, np.array(room, dtype=np.int64), most_exchanged)
    places = sorted(
        ((number + 0.5) / count, index)
        for index, count in enumerate(held.tolist())
        for number in range(count)
    )
    return np.stack([rows[index] for _, index in places])


def _rows(time: TimeModel, start: Counts, node_sets: Iterable[Sequence[int]]) -> Counts:
    """Different rows, those of `start` first."""
    n_groups, n_nodes = time.model.n_groups, start.shape[1]
    found = dict.fromkeys(map(tuple, start.tolist()))
    sets = list(node_sets)
    used = {node for nodes in sets for node in nodes}
    if _n_rows(n_groups, len(used)) <= _ALL_ROWS:
        found |= dict.fromkeys(_every_row(n_groups, n_nodes, sorted(used)))
    else:
        most = min(_MOST_ROWS, int((2 * _MOST_WORK / n_nodes) ** 0.5) - 1)
        found[n_groups, *[0] * (n_nodes - 1)] = None
        for nodes in sets:
            for own in sorted({round(part) for part in np.linspace(0, n_groups, _OWN_SHARES)} - {n_groups}):
                if len(found) < most:
                    found[_quickest_row(time, nodes, own, n_nodes)] = None
    return np.array(list(found), dtype=np.int64)


def _n_rows(n_groups: int, n_workers: int) -> int:
    """Ways to divide groups between the coordinator and the workers."""
    count = 1
    for number in range(1, n_workers + 1):
        count = count * (n_groups + number) // number
    return count


def _every_row(n_groups: int, n_nodes: int, used: Sequence[int]) -> list[tuple[int, ...]]:
    rows = []
    for bars in itertools.combinations(range(n_groups + len(used)), len(used)):
        edges = (-1, *bars, n_groups + len(used))
        parts = [b - a - 1 for a, b in itertools.pairwise(edges)]
        row = [0] * n_nodes
        row[0] = parts[0]
        for node, part in zip(used, parts[1:], strict=True):
            row[1 + node] = part
        rows.append(tuple(row))
    return rows


def _quickest_row(time: TimeModel, nodes: Sequence[int], own: int, n_nodes: int) -> tuple[int, ...]:
    """The rest of the groups given one by one to the worker that is done with it first."""
    row = [0] * n_nodes
    row[0] = own
    group = time.group.tolist()
    ends = []
    for node in nodes:
        travel = float(time.outward[node] + time.back[node] + time.share_overhead[node])
        ends.append((travel + group[node], node))
    heapq.heapify(ends)
    for _ in range(time.model.n_groups - own):
        end, node = ends[0]
        row[1 + node] += 1
        heapq.heapreplace(ends, (end + group[node], node))
    return tuple(row)


def _exchange(rows: Counts, seconds: Floats, held: Counts, room: Counts, most_exchanged: int) -> Counts:
    """Replace two or three rows by others while that saves time and keeps within memory.

    Args:
        rows: (n_rows, n_nodes); `seconds` of each.
        held: (n_rows,) how many layers have each row.
    """
    left = _BUDGET
    held = held.copy()
    for size in range(1, most_exchanged + 1):
        if math.comb(len(rows) + size - 1, size) * rows.shape[1] > _MOST_WORK:
            break
        combinations = itertools.combinations_with_replacement(range(len(rows)), size)
        chosen = np.array(list(combinations), dtype=np.intp)
        bundle = _Bundle(chosen, rows[chosen].sum(axis=1), seconds[chosen].sum(axis=1))
        improved = True
        while improved and left > 0:
            improved, left = _exchange_once(rows, seconds, held, room, bundle, left)
    return held


class _Bundle(NamedTuple):
    """All choices of so many rows: which, (n, size); their groups, (n, n_nodes); their time, (n,)."""

    chosen: NDArray[np.intp]
    groups: Counts
    seconds: Floats


def _exchange_once(
    rows: Counts, seconds: Floats, held: Counts, room: Counts, bundle: _Bundle, left: int
) -> tuple[bool, int]:
    """Make the exchange that saves most, in `held`; whether there was one, and what is left of the budget."""
    free = room - held @ rows
    # The slowest rows first: there is most to save, should the time not last for all.
    present = sorted(np.flatnonzero(held).tolist(), key=lambda index: -seconds[index])
    size = bundle.chosen.shape[1]
    best_saving, best_given, best_taken = -1e-9, np.zeros(0, dtype=np.intp), 0
    for given in itertools.combinations_with_replacement(present, size):
        removed = np.bincount(given, minlength=len(rows))
        if left <= 0 or (removed > held).any():
            continue
        left -= bundle.groups.size
        saving = bundle.seconds - float(seconds[list(given)].sum())
        (promising,) = np.nonzero(saving < best_saving)
        promising = promising[(bundle.groups[promising] <= free + removed @ rows).all(axis=1)]
        if len(promising):
            best_taken = int(promising[np.argmin(saving[promising])])
            best_saving, best_given = float(saving[best_taken]), removed
    if not len(best_given):
        return False, left
    taken = np.bincount(bundle.chosen[best_taken], minlength=len(rows))
    difference = (taken - best_given) @ rows
    times = int((held[best_given > 0] // best_given[best_given > 0]).min())
    grows = difference > 0
    if grows.any():
        times = min(times, int((free[grows] // difference[grows]).min()))
    held += max(times, 1) * (taken - best_given)
    return True, left
