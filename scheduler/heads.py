"""How the LM head can be spread: slices given to whoever is done with them first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from scheduler.timing import TimeModel

# Parts of the head that the coordinator keeps.
_OWN_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of so many workers, the quickest, all subsets are tried.
_QUICKEST = 3


def spread_head(time: TimeModel, nodes: Sequence[int], own: int | None) -> tuple[int, ...] | None:
    """Slices for each node, given one by one to whoever is done first.

    Args:
        nodes: workers to use, indices from 0; none holds more than fits its memory.
        own: the coordinator's slices; as many as is fastest where None.

    Returns:
        None where the workers have too little room.
    """
    model = time.model
    slices = [0] * (1 + len(time.workers))
    room = {
        1 + node: int(time.workers[node].device.memory_bytes // max(model.head_slice_bytes, 1e-9))
        for node in nodes
    }
    waiting: list[tuple[float, int]] = []
    for node in nodes:
        travel = float(time.head_travel[node] + time.share_overhead[node])
        heapq.heappush(waiting, (travel + float(time.slice_[node]), 1 + node))
    if own is None:
        heapq.heappush(waiting, (time.own_slice, 0))
    slices[0] = own or 0
    for _ in range(model.n_head_slices - slices[0]):
        while waiting and waiting[0][1] and slices[waiting[0][1]] >= room[waiting[0][1]]:
            heapq.heappop(waiting)
        if not waiting:
            return None
        end, node = waiting[0]
        slices[node] += 1
        step = time.own_slice if node == 0 else float(time.slice_[node - 1])
        heapq.heapreplace(waiting, (end + step, node))
    return tuple(slices)


def head_choices(time: TimeModel, nodes: Sequence[int]) -> list[tuple[int, ...]]:
    """Ways to spread the head over some workers worth comparing, the fastest first.

    Spread as soon finished as possible, or with a part of it on the coordinator; over all of the workers, or
    some of those that are done with it first, as memory may be better used for groups on the others.
    """
    n_slices = time.model.n_head_slices

    def alone(node: int) -> float:
        return float(time.head_travel[node] + n_slices * time.slice_[node])

    quickest = sorted(nodes, key=alone)
    sizes = range(1, min(len(nodes), _QUICKEST) + 1)
    sets = {
        tuple(sorted(chosen))
        for size in sizes
        for chosen in itertools.combinations(quickest[:_QUICKEST], size)
    }
    sets.add(tuple(sorted(nodes)))
    owns = [None, *sorted({round(part * n_slices) for part in _OWN_PARTS})]
    found = {spread_head(time, chosen, own) for chosen in sets for own in owns}
    heads = [head for head in found if head is not None]
    return sorted(heads, key=lambda head: (time.head(head), head))
