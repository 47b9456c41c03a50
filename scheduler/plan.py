"""A plan: which node computes which neuron groups, and how long the coordinator waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scheduler.errors import SchedulingError
from scheduler.patience import Response, allowance
from scheduler.placement import GroupsOfLayer, group_room, node_bytes, place, place_head, replicas
from scheduler.profiles import DeviceProfile, ModelProfile
from scheduler.profiles import Worker as Worker
from scheduler.reasons import reason_for
from scheduler.search import Draft, Search
from scheduler.timing import Counts, Mode, TimeModel


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes what. Node 0 is the coordinator, node w the w-th worker.

    Attributes:
        number: of this plan; requests name it.
        names: of the nodes.
        groups: for each layer and node the group numbers; every group once in each layer.
        replicas: for each layer the remote groups that the coordinator keeps as well.
        head_slices: for each node the slices of the head.
        syncs: boundaries at which the coordinator waits for everything outstanding; the last is n_layers.
        copies: datagram copies for each worker.
        seconds_per_token: predicted mean.
        alone_seconds: the same for the coordinator by itself; None where the model does not fit it.
        nodes_used: nodes that compute, the coordinator among them.
        reason: one sentence for a person.
        bytes_held: weights on each node, replicas included.
        mode: that it was made for.
        quality: that its syncs keep; 1 for `exact`. A request that wants more must run exactly.
        late_increase: predicted ln-perplexity increase of what comes late as a rule.
    """

    number: int
    names: tuple[str, ...]
    groups: tuple[GroupsOfLayer, ...]
    replicas: tuple[tuple[int, ...], ...]
    head_slices: tuple[tuple[int, ...], ...]
    syncs: tuple[int, ...]
    copies: tuple[int, ...]
    seconds_per_token: float
    alone_seconds: float | None
    nodes_used: tuple[int, ...]
    reason: str
    bytes_held: tuple[int, ...]
    mode: Mode = "exact"
    quality: float = 1.0
    late_increase: float = 0.0

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.groups)

    @property
    def counts(self) -> Counts:
        """(n_layers, n_nodes) groups on each node."""
        return np.array([[len(held) for held in layer] for layer in self.groups], dtype=np.int64)

    @property
    def remote_shares(self) -> tuple[float, ...]:
        """Share of each layer's groups that workers compute."""
        return tuple(1.0 - len(layer[0]) / sum(map(len, layer)) for layer in self.groups)

    @property
    def round_trips(self) -> int:
        """Waits in a token: sync boundaries with something outstanding, and the head if it is remote."""
        shares, start, waits = self.remote_shares, 0, 0
        for sync in self.syncs:
            waits += any(share > 0 for share in shares[start:sync])
            start = sync
        return waits + any(map(len, self.head_slices[1:]))

    def explain(self) -> list[tuple[str, int, float, int, int, int]]:
        """A row for each node: name, groups over all layers, their share, slices, bytes held, copies."""
        totals = self.counts.sum(axis=0).tolist()
        every = sum(totals)
        return [
            (
                name,
                totals[node],
                totals[node] / every,
                len(self.head_slices[node]),
                self.bytes_held[node],
                self.copies[node - 1] if node else 1,
            )
            for node, name in enumerate(self.names)
        ]


def make_plan(
    model: ModelProfile,
    coordinator: DeviceProfile,
    workers: Sequence[Worker],
    importance: NDArray[np.floating],
    *,
    mode: Mode = "exact",
    response: Response | None = None,
    quality: float = 0.99,
    number: int = 0,
) -> Plan:
    """The fastest plan found. The same arguments give the same plan.

    Args:
        importance: (n_layers, n_groups), for example mean norms of contributions; at least 0.
        mode: `exact` syncs after every layer; `relaxed` as seldom as the quality allows.
        response: what being late costs this model, or one of another depth; without it `relaxed` syncs after
            every layer too, but waits up to a deadline only.
        quality: for `relaxed`; 0.99 allows a perplexity 1 % worse.

    Raises:
        SchedulingError: the model does not fit the devices' memory, or an argument is out of range.
    """
    scores = np.asarray(importance, dtype=np.float64)
    if scores.shape != (model.n_layers, model.n_groups) or not np.all(np.isfinite(scores)):
        needed = f"{model.n_layers} layers x {model.n_groups} finite numbers"
        raise SchedulingError(f"importance has the shape {scores.shape}; it must be {needed}")
    if mode not in ("exact", "relaxed"):
        raise SchedulingError(f"mode is {mode!r}; it must be 'exact' or 'relaxed'")
    allowance(quality)
    if response is not None:
        response = response.resampled(model.n_layers)
    time = TimeModel(model, coordinator, workers)
    alone = _alone(time)
    best = Search(time, mode, response, quality).best() if workers else None
    if best is not None and best.head[0] == model.n_head_slices and not best.counts[:, 1:].any():
        best = None  # the best use of the workers is none
    if best is None and alone is None:
        raise SchedulingError(_no_room(time))
    chosen = min((draft for draft in (alone, best) if draft), key=lambda draft: draft.seconds)
    plan = _plan(time, chosen, alone, best, scores, number)
    if mode == "exact":
        return plan
    late = time.lateness(chosen.counts, chosen.syncs)
    increase = response.late_increase(late, plan.remote_shares) if response is not None else 0.0
    return replace(plan, mode=mode, quality=quality, late_increase=increase)


def plan_seconds(
    plan: Plan,
    model: ModelProfile,
    coordinator: DeviceProfile,
    workers: Sequence[Worker],
    mode: Mode,
) -> float:
    """Mean seconds of a token that a plan would take with these profiles, for example newly measured ones.

    Raises:
        SchedulingError: the plan was made for another number of nodes, layers or groups.
    """
    counts = plan.counts
    if counts.shape != (model.n_layers, 1 + len(workers)) or counts[0].sum() != model.n_groups:
        found = f"{counts.shape[0]} layers of {counts[0].sum()} groups on {counts.shape[1]} nodes"
        raise SchedulingError(f"the plan is for {found}; the profiles are of other numbers: make a new plan")
    time = TimeModel(model, coordinator, workers)
    if len(plan.nodes_used) == 1:
        return time.alone_seconds
    return time.token(counts, [len(held) for held in plan.head_slices], plan.syncs, mode)


def _alone(time: TimeModel) -> Draft | None:
    """Everything on the coordinator, where it fits."""
    model = time.model
    if time.coordinator.memory_bytes < model.total_bytes:
        return None
    counts = np.zeros((model.n_layers, 1 + len(time.workers)), dtype=np.int64)
    counts[:, 0] = model.n_groups
    head = (model.n_head_slices, *[0] * len(time.workers))
    return Draft(counts, head, tuple(range(1, model.n_layers + 1)), time.alone_seconds)


def _plan(
    time: TimeModel,
    chosen: Draft,
    alone: Draft | None,
    best: Draft | None,
    importance: NDArray[np.float64],
    number: int,
) -> Plan:
    model, workers = time.model, time.workers
    groups = place(chosen.counts, importance, workers)
    spare = group_room(model, time.coordinator, workers, chosen.head)[0] - int(chosen.counts[:, 0].sum())
    kept = replicas(groups, importance, model, spare * model.group_bytes)
    used = chosen.counts.any(axis=0) | (np.array(chosen.head) > 0)
    used[0] = True
    return Plan(
        number=number,
        names=(time.coordinator.name, *(worker.device.name for worker in workers)),
        groups=groups,
        replicas=kept,
        head_slices=place_head(chosen.head),
        syncs=chosen.syncs,
        copies=time.copies,
        seconds_per_token=chosen.seconds,
        alone_seconds=None if alone is None else alone.seconds,
        nodes_used=tuple(np.flatnonzero(used).tolist()),
        reason=reason_for(time, chosen, alone, best),
        bytes_held=node_bytes(model, groups, chosen.head, kept),
    )


def _no_room(time: TimeModel) -> str:
    model, coordinator = time.model, time.coordinator
    lent = sum(worker.device.memory_bytes for worker in time.workers)
    if coordinator.memory_bytes < model.coordinator_bytes:
        return (
            f"{coordinator.name} may hold {megabytes(coordinator.memory_bytes)} and needs "
            f"{megabytes(model.coordinator_bytes)} for attention and embeddings, which cannot be spread; "
            "raise its memory limit or take a smaller model"
        )
    lenders = "1 worker" if len(time.workers) == 1 else f"{len(time.workers)} workers"
    others = f" and {lenders} {megabytes(lent)}" if lent else ", and no other device lends any"
    return (
        f"the model needs {megabytes(model.total_bytes)}; {coordinator.name} may hold "
        f"{megabytes(coordinator.memory_bytes)}{others}; add a worker or raise a memory limit"
    )


def megabytes(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
