"""Which row each layer gets where every layer is waited for: layers then differ in nothing but their rows.

The time of a token is the sum of its rows' times, and only memory ties layers together. So a few rows are
made beforehand, among them the fastest for each share of the coordinator and each promising set of workers,
and the best sum of them within memory is looked for by exchanging two at a time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from scheduler.timing import Counts, Floats, Mode, TimeModel

# All rows are taken where there are no more of them than this.
_ALL_ROWS = 200
_MOST_ROWS = 160
# Rows times rows times nodes, which an exchange looks at.
_MOST_WORK = 600_000
# Shares of the coordinator that are tried for each set of workers.
_OWN_SHARES = 9
_EXCHANGES = 60


def blend(
    time: TimeModel, mode: Mode, start: Counts, node_sets: Iterable[Sequence[int]], room: Sequence[int]
) -> Counts:
    """A cut at least as fast as `start`, its rows spread evenly over the layers.

    Args:
        start: (n_layers, 1 + n_workers) groups, within memory.
        node_sets: sets of workers, indices from 0, the most promising first.
        room: groups that each node may hold over all layers.
    """
    rows = _rows(time, start, node_sets)
    seconds = np.array([time.run(row[None, :], mode)[0] for row in rows])
    held = np.array([int((start == row).all(axis=1).sum()) for row in rows])
    held = _exchange(rows, seconds, held, np.array(room, dtype=np.int64))
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
        most = min(_MOST_ROWS, int((_MOST_WORK / n_nodes) ** 0.5))
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


def _exchange(rows: Counts, seconds: Floats, held: Counts, room: Counts) -> Counts:
    """Replace two rows by two others while that saves time and keeps within memory.

    Args:
        rows: (n_rows, n_nodes); `seconds` of each.
        held: (n_rows,) how many layers have each row.
    """
    if held.sum() == 1:
        fitting = np.where((rows <= room).all(axis=1), seconds, np.inf)
        only: Counts = np.zeros(len(rows), dtype=np.int64)
        only[np.argmin(fitting)] = 1
        return only
    pairs = rows[:, None, :] + rows[None, :, :]
    sums = seconds[:, None] + seconds[None, :]
    held = held.copy()
    for _ in range(_EXCHANGES):
        free = room - held @ rows
        best = (-1e-9, 0, 0, 0, 0)
        present = np.flatnonzero(held).tolist()
        for i, j in itertools.combinations_with_replacement(present, 2):
            if i == j and held[i] < 2:
                continue
            saving = sums - (seconds[i] + seconds[j])
            fits = saving < best[0]
            if not fits.any():
                continue
            fits &= (pairs <= free + rows[i] + rows[j]).all(axis=2)
            saving = np.where(fits, saving, 0.0)
            k, m = divmod(int(np.argmin(saving)), len(rows))
            if saving[k, m] < best[0]:
                best = (float(saving[k, m]), i, j, k, m)
        saving_found, i, j, k, m = best
        if saving_found >= -1e-9:
            break
        difference = rows[k] + rows[m] - rows[i] - rows[j]
        times = int(held[i]) // 2 if i == j else int(min(held[i], held[j]))
        grows = difference > 0
        if grows.any():
            times = min(times, int((free[grows] // difference[grows]).min()))
        for index, sign in ((i, -1), (j, -1), (k, 1), (m, 1)):
            held[index] += sign * max(times, 1)
    return held
