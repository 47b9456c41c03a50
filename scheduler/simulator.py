"""Runs a plan over virtual nodes: seeded jitter, loss and deaths, no real time.

Written apart from `scheduler.timing`: every exchange is drawn, fragment by fragment, instead of its mean
being computed, so that the one can be held against the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scheduler.deadlines import BACKOFF, DEVIATIONS, LEAST_SLACK
from scheduler.plan import Plan
from scheduler.profiles import DeviceProfile, ModelProfile, Worker
from scheduler.timing import Mode

Floats = NDArray[np.float64]
# Requests for one answer before the coordinator computes it itself.
_ATTEMPTS = 3
_MEAN_DEVIATION = math.sqrt(2 / math.pi)


@dataclass(slots=True)
class Simulation:
    """What happened.

    Attributes:
        seconds: (n_tokens,) time of each token.
        on_time: contributions there at the boundary after their layer, in units of fragments.
        late: by how many layers -> fragments folded in so late.
        lost: fragments that never came within their token.
        recomputed: fragments that the coordinator computed in a worker's place.
    """

    seconds: Floats
    on_time: int = 0
    late: dict[int, int] = field(default_factory=dict)
    lost: int = 0
    recomputed: int = 0


def simulate(
    plan: Plan,
    model: ModelProfile,
    coordinator: DeviceProfile,
    workers: Sequence[Worker],
    *,
    n_tokens: int,
    mode: Mode = "exact",
    seed: int = 0,
    deaths: Mapping[int, int] | None = None,
) -> Simulation:
    """Generate tokens under a plan.

    Args:
        mode: `exact` asks again until the hard limit and then computes here; `relaxed` goes on at each sync's
            deadline, takes late fragments in at later boundaries, and loses those that miss the last one.
        deaths: node -> token from which on it answers nothing.
    """
    run = _Run(plan, model, coordinator, workers, mode, np.random.default_rng(seed))
    result = Simulation(np.zeros(n_tokens))
    for token in range(n_tokens):
        dead = {node for node, at in (deaths or {}).items() if token >= at}
        result.seconds[token] = run.token(result, dead)
    return result


class _Run:
    """The virtual cluster between tokens: who is known to be dead."""

    def __init__(
        self,
        plan: Plan,
        model: ModelProfile,
        coordinator: DeviceProfile,
        workers: Sequence[Worker],
        mode: Mode,
        random: np.random.Generator,
    ) -> None:
        self._plan, self._model, self._mode, self._random = plan, model, mode, random
        speed = coordinator.planned_bytes_per_second
        self._attention = model.attention_bytes / speed
        self._own_group = model.group_bytes / speed
        self._own_slice = model.head_slice_bytes / speed
        self._overhead = coordinator.overhead_seconds
        self._given_up: set[int] = set()
        links = [worker.link for worker in workers]
        devices = [worker.device for worker in workers]
        self._group = np.array([model.group_bytes / d.planned_bytes_per_second for d in devices])
        self._slice = np.array([model.head_slice_bytes / d.planned_bytes_per_second for d in devices])
        self._share = np.array([device.overhead_seconds for device in devices])
        self._round_trip = np.array([link.round_trip_seconds for link in links])
        self._jitter = np.array([link.jitter_seconds for link in links])
        self._loss = np.array([link.loss for link in links])
        self._exchange = np.array([link.overhead_seconds for link in links])
        self._copies = np.array(plan.copies, dtype=np.int64)
        self._width = np.array([link.bytes_per_second for link in links]) / np.maximum(self._copies, 1)
        self._slack = np.maximum(DEVIATIONS * _MEAN_DEVIATION * self._jitter, LEAST_SLACK)
        self._counts = plan.counts
        self._head = np.array([len(held) for held in plan.head_slices])

    def token(self, result: Simulation, dead: set[int]) -> float:
        """One token; its seconds."""
        model, syncs = self._model, set(self._plan.syncs)
        alone = len(self._plan.nodes_used) == 1
        clock = 0.0
        free = np.zeros(len(self._group))
        pending: list[_Pending] = []
        for layer in range(model.n_layers):
            row = self._counts[layer]
            nodes = np.flatnonzero(row[1:])
            asked = np.array([node for node in nodes if node + 1 not in self._given_up], dtype=np.intp)
            # Once here, the groups of those that were given up are computed here.
            own = float(row[0] + row[1:][nodes].sum() - row[1:][asked].sum()) * self._own_group
            clock += self._attention
            if len(asked) and not alone:
                clock += self._overhead + float(self._exchange[asked].sum())
                computing = self._share[asked] + row[1:][asked] * self._group[asked]
                pending.append(
                    self._ask(layer, asked, clock, free, computing, model.output_bytes / self._width, dead)
                )
                pending[-1].own = row[1:][asked] * self._own_group
            clock += own
            if layer + 1 in syncs:
                clock = self._wait(pending, clock, dead, result)
            self._collect(pending, clock, layer + 1, result)
        for one in pending:
            result.lost += one.left()
        return clock + self._head_seconds(result, dead)

    def _ask(
        self,
        layer: int,
        nodes: NDArray[np.intp],
        clock: float,
        free: Floats,
        computing: Floats,
        answer_travel: Floats,
        dead: set[int],
    ) -> _Pending:
        """Draw when each fragment of each answer comes."""
        model, random = self._model, self._random
        n_fragments = model.output_fragments
        jitter = self._jitter[nodes] * random.standard_normal(len(nodes))
        half = np.maximum(self._round_trip[nodes] + jitter, 0.0) / 2
        outward = half + model.input_bytes / self._width[nodes]
        expected = computing + self._round_trip[nodes] + model.input_bytes / self._width[nodes]
        expected = expected + answer_travel[nodes] + np.maximum(free[nodes] - clock, 0.0)
        resend = expected + self._slack[nodes]
        chance = self._loss[nodes] ** self._copies[nodes]
        arrivals = np.full((len(nodes), n_fragments), np.inf)
        sent = np.full(len(nodes), clock)
        computed = np.full(len(nodes), np.inf)
        for attempt in range(_ATTEMPTS):
            heard = random.random(len(nodes)) < (1 - chance) ** model.input_fragments
            here = sent + outward
            done = np.maximum(free[nodes], here) + computing
            first = heard & ~np.isfinite(computed)
            computed = np.where(first, done, computed)
            free[nodes] = np.where(first, done, free[nodes])
            answered = np.where(heard, np.maximum(computed, here), np.inf)
            kept = random.random((len(nodes), n_fragments)) >= chance[:, None]
            back = answered + half + answer_travel[nodes]
            arrivals = np.minimum(arrivals, np.where(kept, back[:, None], np.inf))
            sent = sent + resend * BACKOFF**attempt
        for place, node in enumerate(nodes.tolist()):
            if node + 1 in dead:
                arrivals[place] = np.inf
        return _Pending(layer, nodes, arrivals, clock + resend, sent)

    def _wait(self, pending: list[_Pending], clock: float, dead: set[int], result: Simulation) -> float:
        if self._mode == "relaxed":
            for one in pending:
                finite = np.where(np.isfinite(one.arrivals), one.arrivals, np.inf).max(axis=1)
                clock = max(clock, float(np.minimum(finite, one.deadline).max(initial=0.0)))
            return clock
        for one in pending:
            last = one.arrivals.max(axis=1)
            late = last > one.hard_limit
            if late.any():
                clock = max(clock, float(one.hard_limit[late].max())) + float(one.own[late].sum())
                # One that lives shows other signs of life, and is asked again for the next layer.
                self._given_up |= {int(node) + 1 for node in one.nodes[late]} & dead
                result.recomputed += int((one.arrivals[late] > one.hard_limit[late][:, None]).sum())
                one.arrivals[late] = np.minimum(one.arrivals[late], clock)
            clock = max(clock, float(one.arrivals.max(initial=0.0)))
        return clock

    def _collect(self, pending: list[_Pending], clock: float, boundary: int, result: Simulation) -> None:
        for one in pending:
            here = one.take(clock)
            late = boundary - 1 - one.layer
            if late == 0:
                result.on_time += here
            elif here:
                result.late[late] = result.late.get(late, 0) + here
        pending[:] = [one for one in pending if one.left()]

    def _head_seconds(self, result: Simulation, dead: set[int]) -> float:
        nodes = np.flatnonzero(self._head[1:])
        own = float(self._head[0]) * self._own_slice
        asked = np.array([node for node in nodes if node + 1 not in self._given_up], dtype=np.intp)
        lost = float(self._head[1:][nodes].sum() - self._head[1:][asked].sum()) * self._own_slice
        if not len(asked):
            return own + lost
        clock = self._overhead + float(self._exchange[asked].sum())
        travel = self._head[1:] * self._model.head_slice_output_bytes / self._width
        computing = self._share[asked] + self._head[1:][asked] * self._slice[asked]
        one = self._ask(0, asked, clock, np.zeros(len(self._group)), computing, travel, dead)
        one.own = self._head[1:][asked] * self._own_slice
        mode, self._mode = self._mode, "exact"
        end = self._wait([one], clock + own + lost, dead, result)
        self._mode = mode
        return end


class _Pending:
    """One layer's answers: (n_nodes, n_fragments) arrivals; infinite once taken or where none comes."""

    def __init__(
        self, layer: int, nodes: NDArray[np.intp], arrivals: Floats, deadline: Floats, hard_limit: Floats
    ) -> None:
        self.layer, self.nodes, self.arrivals = layer, nodes, arrivals
        self.deadline, self.hard_limit = deadline, hard_limit
        self.own: Floats = np.zeros(len(nodes))
        self._taken = np.zeros(arrivals.shape, dtype=bool)

    def take(self, clock: float) -> int:
        """Fragments that came by now and were not counted yet."""
        new = (self.arrivals <= clock) & ~self._taken
        self._taken |= new
        return int(new.sum())

    def left(self) -> int:
        """Fragments outstanding."""
        return int((~self._taken).sum())
