"""Layouts that keep a quality without waiting for every layer, for a choice of remote shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scheduler.filling import Filling, fill
from scheduler.layouts import LayerTimes, Layout, late_table, layouts
from scheduler.patience import Response, allowance
from scheduler.sync_ladder import Floats
from scheduler.timing import LATE_MARGIN, TimeModel

# Multiples of the layers over which the groups that must be remote are spread: with fewer layers than there
# are, some are local and the others' shares larger; with more, some layers are remote as a whole.
_SPREADS = (1.5, 1.25, 1.1, 1.0, 0.85)
# Layouts kept for each share, the fastest first.
_BEST = 3
# What the sum over layers leaves out (a whole group more or less) is checked after rounding.
_LENIENCE = 1.25


def patient_layouts(
    time: TimeModel,
    nodes: Sequence[int],
    room: Sequence[int],
    response: Response,
    quality: float,
    loss: float,
) -> list[tuple[float, Layout, Filling]]:
    """Layouts with their seconds, about, and the cut of their partly remote layers.

    Args:
        nodes: workers to use, indices from 0.
        room: groups that the coordinator and each worker may hold over all layers.
        response: of a model of this depth.
        loss: share of contributions that never arrive.
    """
    model = time.model
    missing = max(0, model.n_layers * model.n_groups - room[0])
    found: list[tuple[float, Layout, Filling]] = []
    for remote in _remote_groups(time, nodes, room, missing):
        share = remote / model.n_groups
        bound = allowance(quality) - loss * response.lost_increase([share] * model.n_layers)
        if bound > 0:
            found += _for_share(time, nodes, room, response, remote, bound)[:_BEST]
    return sorted(found, key=lambda option: (option[0], option[2].own, option[1].syncs))


def _remote_groups(time: TimeModel, nodes: Sequence[int], room: Sequence[int], missing: int) -> list[int]:
    """Numbers of remote groups of a layer that are worth trying."""
    n_layers, n_groups = time.model.n_layers, time.model.n_groups
    numbers = {math.ceil(missing / (spread * n_layers)) for spread in _SPREADS}
    for filling in fill(time, nodes, room, "relaxed", n_layers / 2, [n_layers]):
        balanced = n_groups - filling.own
        numbers |= {math.ceil(balanced), round(balanced / 2)}
    return sorted(number for number in numbers if 0 < number <= n_groups)


def _for_share(
    time: TimeModel, nodes: Sequence[int], room: Sequence[int], response: Response, remote: int, bound: float
) -> list[tuple[float, Layout, Filling]]:
    """Layouts within the bound, the fastest first."""
    n_layers, n_groups = time.model.n_layers, time.model.n_groups
    share = remote / n_groups
    missing = max(0, n_layers * n_groups - room[0])
    lent = sum(room[1 + index] for index in nodes)
    filling = _division(time, nodes, room, remote)
    if filling is None:
        return []
    parts = np.array(filling.shares) / sum(filling.shares)
    times, most_late = _layer_times(time, nodes, parts, remote)
    table = late_table(response.late_cost, most_late)
    options = []
    for layout in layouts(table * response.share_factor(share), times, bound):
        seconds, additive, groups = times.judge(layout, table)
        if missing <= groups <= lent and response.increase(additive, share) <= bound * _LENIENCE:
            options.append((seconds, layout, filling))
    return sorted(options, key=lambda option: (option[0], option[1].syncs))


def _division(time: TimeModel, nodes: Sequence[int], room: Sequence[int], remote: int) -> Filling | None:
    """How workers divide the remote groups of a layer, in real numbers."""
    n_layers, share = time.model.n_layers, remote / time.model.n_groups
    # How many layers can be so is decided elsewhere, by the coordinator's memory.
    roomy = [n_layers * time.model.n_groups, *room[1:]]
    found = fill(time, nodes, roomy, "relaxed", n_layers / 2, [n_layers], share, least_remote=share)
    return found[0] if found and sum(found[0].shares) > 0 else None


def _layer_times(time: TimeModel, nodes: Sequence[int], parts: Floats, remote: int) -> tuple[LayerTimes, int]:
    """Times of the kinds of layers, and by how many layers a contribution is late if nobody waits."""
    n_groups = time.model.n_groups
    chosen = np.array(nodes, dtype=np.intp)[parts > 0]
    parts = parts[parts > 0]
    travel = time.outward[chosen] + time.share_overhead[chosen] + time.back[chosen]
    exchange = travel + parts * remote * time.group[chosen]
    own = (n_groups - remote) * time.own_group
    full_layer = time.attention + time.overhead + float(time.exchange_overhead[chosen].sum())
    times = LayerTimes(
        n_groups=n_groups,
        remote=remote,
        local_layer=time.attention + n_groups * time.own_group,
        remote_layer=full_layer + own,
        full_layer=full_layer,
        wait=max(0.0, float(exchange.max()) - own),
        full_wait=float((travel + parts * n_groups * time.group[chosen]).max()),
    )
    late = float((exchange + LATE_MARGIN * time.jitter[chosen]).max()) - own
    return times, max(0, math.ceil(late / times.remote_layer))
