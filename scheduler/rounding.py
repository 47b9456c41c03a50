"""From a cut in real numbers to whole groups in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scheduler.filling import Filling
from scheduler.layouts import Layout
from scheduler.timing import Counts, Floats, TimeModel


def whole_rows(filling: Filling, time: TimeModel, layout: Layout, room: Sequence[int]) -> list[Counts]:
    """Cuts in whole groups that are near a filling; (n_layers, 1 + n_workers) each.

    The first has the same row in every partly remote layer, as soon finished as possible, and is missing
    where memory does not allow that or other layers are remote as a whole. The second keeps each node's sum
    near its real number from layer to layer.

    Args:
        room: groups that each node may hold.
    """
    n_groups = time.model.n_groups
    wanted = np.zeros(1 + len(time.workers))
    wanted[0] = filling.own
    wanted[[1 + index for index in filling.nodes]] = filling.shares
    left = np.array(room, dtype=np.int64)
    left[0] -= (time.model.n_layers - len(layout.cut)) * n_groups
    found = []
    if not layout.full:
        equal = _equal_row(wanted, filling, time, left // max(len(layout.remote), 1), layout.run_length)
        if equal is not None:
            found.append(_all_layers(time, layout.remote, np.tile(equal, (len(layout.remote), 1))))
    everything = wanted * (n_groups / max(n_groups - filling.own, 1e-9))
    everything[0] = 0.0
    full = set(layout.full)
    each = np.stack([everything if layer in full else wanted for layer in layout.cut])
    diffused = _diffused(each, left, n_groups)
    if diffused is not None:
        found.append(_all_layers(time, layout.cut, diffused))
    return found


def _all_layers(time: TimeModel, remote: Sequence[int], rows: Counts) -> Counts:
    counts = np.zeros((time.model.n_layers, 1 + len(time.workers)), dtype=np.int64)
    counts[:, 0] = time.model.n_groups
    counts[list(remote)] = rows
    return counts


def _equal_row(
    wanted: Floats, filling: Filling, time: TimeModel, caps: Counts, run_length: float
) -> Counts | None:
    """One row for all layers: rounded down, then each group left to the node that is done with it first."""
    row = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), caps)
    before = time.attention + time.overhead
    nodes = np.array([0, *(1 + index for index in filling.nodes)], dtype=np.intp)
    workers = nodes[1:] - 1
    travel = time.outward[workers] + time.back[workers]
    ends = np.empty(len(nodes))
    for _ in range(int(time.model.n_groups - row.sum())):
        ends[0] = run_length * (before + (row[0] + 1) * time.own_group)
        each = time.share_overhead[workers] + (row[nodes[1:]] + 1) * time.group[workers]
        last = (run_length - 1) * (before + row[0] * time.own_group) + each
        ends[1:] = before + travel + np.maximum(run_length * each, last)
        ends[row[nodes] >= caps[nodes]] = np.inf
        first = int(np.argmin(ends))
        if not np.isfinite(ends[first]):
            return None
        row[nodes[first]] += 1
    return row


def _diffused(wanted: Floats, room: Counts, n_groups: int) -> Counts | None:
    """Rows of `n_groups` whose running sums stay within about one of those of the wanted rows."""
    rows = np.zeros(wanted.shape, dtype=np.int64)
    (used,) = np.nonzero(wanted.sum(axis=0) > 1e-9)
    asked, left = np.cumsum(wanted[:, used], axis=0), room[used].copy()
    given = np.zeros(len(used), dtype=np.int64)
    for number in range(len(wanted)):
        due = asked[number] - given
        row = np.floor(due + 1e-9).astype(np.int64)
        np.minimum(row, left, out=row)
        np.maximum(row, 0, out=row)
        while (difference := n_groups - int(row.sum())) != 0:
            step = 1 if difference > 0 else -1
            (open_,) = np.nonzero(row < left if step > 0 else row > 0)
            if not len(open_):
                return None
            first = (-step * (due - row)[open_]).argsort(kind="stable")
            row[open_[first[: abs(difference)]]] += step
        rows[number, used] = row
        given += row
        left -= row
    return rows
