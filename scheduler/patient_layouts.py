"""Layouts that keep a quality without waiting for every layer, for a choice of remote shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Option:
    """A layout with its seconds, about, its remote groups over all layers, and what it costs in quality."""

    seconds: float
    layout: Layout
    groups: float
    increase: float


class PatientLayouts:
    """Finds layouts; what it found for some workers and a share serves for every way to spread the head.

    Args:
        response: of a model of this depth.
    """

    def __init__(self, time: TimeModel, response: Response, quality: float) -> None:
        self._time = time
        self._response = response
        self._allowance = allowance(quality)
        self._found: dict[tuple[tuple[int, ...], int], tuple[Filling, list[_Option]] | None] = {}

    def find(
        self, nodes: tuple[int, ...], room: Sequence[int], loss: float
    ) -> list[tuple[float, Layout, Filling]]:
        """Layouts with their seconds, about, and the cut of their partly remote layers; the fastest first.

        Args:
            nodes: workers to use, indices from 0.
            room: groups that the coordinator and each worker may hold over all layers.
            loss: share of contributions that never arrive.
        """
        n_layers, n_groups = self._time.model.n_layers, self._time.model.n_groups
        missing = max(0, n_layers * n_groups - room[0])
        lent = sum(room[1 + index] for index in nodes)
        found: list[tuple[float, Layout, Filling]] = []
        for remote in self._remote_groups(nodes, room, missing):
            known = self._known(nodes, remote)
            if known is None:
                continue
            filling, options = known
            lost = loss * self._response.lost_increase([remote / n_groups] * n_layers)
            bound = (self._allowance - lost) * _LENIENCE
            fitting = (o for o in options if missing <= o.groups <= lent and o.increase <= bound)
            found += [(o.seconds, o.layout, filling) for o in itertools.islice(fitting, _BEST)]
        return sorted(found, key=lambda option: (option[0], option[2].own, option[1].syncs))

    def _remote_groups(self, nodes: Sequence[int], room: Sequence[int], missing: int) -> list[int]:
        """Numbers of remote groups of a layer that are worth trying."""
        n_layers, n_groups = self._time.model.n_layers, self._time.model.n_groups
        numbers = {math.ceil(missing / (spread * n_layers)) for spread in _SPREADS}
        for filling in fill(self._time, nodes, room, "relaxed", n_layers / 2, [n_layers], quick=True):
            balanced = n_groups - filling.own
            numbers |= {math.ceil(balanced), round(balanced / 2)}
        return sorted(number for number in numbers if 0 < number <= n_groups)

    def _known(self, nodes: tuple[int, ...], remote: int) -> tuple[Filling, list[_Option]] | None:
        if (nodes, remote) not in self._found:
            self._found[nodes, remote] = self._for_share(nodes, remote)
        return self._found[nodes, remote]

    def _for_share(self, nodes: tuple[int, ...], remote: int) -> tuple[Filling, list[_Option]] | None:
        """Layouts for workers and a number of remote groups of a layer, the fastest first."""
        time, response = self._time, self._response
        filling = _division(time, nodes, remote)
        if filling is None:
            return None
        share = remote / time.model.n_groups
        parts = np.array(filling.shares) / sum(filling.shares)
        times, most_late = _layer_times(time, nodes, parts, remote)
        table = late_table(response.late_cost, most_late)
        options = []
        for layout in layouts(table * response.share_factor(share), times, self._allowance):
            seconds, additive, groups = times.judge(layout, table)
            options.append(_Option(seconds, layout, groups, response.increase(additive, share)))
        return filling, sorted(options, key=lambda option: (option.seconds, option.layout.syncs))


def _division(time: TimeModel, nodes: Sequence[int], remote: int) -> Filling | None:
    """How workers divide the remote groups of a layer, in real numbers."""
    n_layers, share = time.model.n_layers, remote / time.model.n_groups
    # How many layers can be so is decided elsewhere, by the coordinator's memory.
    room = [worker.device.memory_bytes // time.model.group_bytes for worker in time.workers]
    room.insert(0, n_layers * time.model.n_groups)
    found = fill(time, nodes, room, "relaxed", n_layers / 2, [n_layers], share, least_remote=share)
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
