"""Which groups go where, once it is known how many: what matters most stays nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scheduler.profiles import DeviceProfile, ModelProfile, Worker
from scheduler.timing import Counts, Floats

GroupsOfLayer = tuple[tuple[int, ...], ...]


def trust_order(workers: Sequence[Worker]) -> list[int]:
    """Workers, indices from 0, the most dependable first: reliability, then loss, then round trip."""

    def key(index: int) -> tuple[float, float, float, int]:
        worker = workers[index]
        return (-worker.device.reliability, worker.link.loss, worker.link.round_trip_seconds, index)

    return sorted(range(len(workers)), key=key)


def place(counts: Counts, importance: Floats, workers: Sequence[Worker]) -> tuple[GroupsOfLayer, ...]:
    """Group numbers for each layer and node.

    The coordinator gets each layer's most important groups, then the workers in order of trust; the least
    important ones go to the least dependable worker.

    Args:
        counts: (n_layers, 1 + n_workers) groups.
        importance: (n_layers, n_groups).
    """
    order = [0, *(1 + index for index in trust_order(workers))]
    layers = []
    for row, scores in zip(counts, importance, strict=True):
        ranked = np.argsort(-scores, kind="stable").tolist()
        held: list[tuple[int, ...]] = [()] * len(row)
        start = 0
        for node in order:
            end = start + int(row[node])
            held[node] = tuple(sorted(ranked[start:end]))
            start = end
        layers.append(tuple(held))
    return tuple(layers)


def replicas(
    groups: Sequence[GroupsOfLayer], importance: Floats, model: ModelProfile, spare_bytes: int
) -> tuple[tuple[int, ...], ...]:
    """Remote groups that the coordinator keeps as well, the most important first, as its memory allows.

    Layers are compared by each group's part of its layer's importance.
    """
    room = max(0, spare_bytes // model.group_bytes)
    totals = np.maximum(importance.sum(axis=1, keepdims=True), 1e-30)
    relative = importance / totals
    remote = [
        (-float(relative[layer, group]), layer, group)
        for layer, nodes in enumerate(groups)
        for held in nodes[1:]
        for group in held
    ]
    chosen: list[list[int]] = [[] for _ in groups]
    for _, layer, group in sorted(remote)[:room]:
        chosen[layer].append(group)
    return tuple(tuple(sorted(layer)) for layer in chosen)


def place_head(slices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Slice numbers for each node: runs of neighbouring slices."""
    held, start = [], 0
    for count in slices:
        held.append(tuple(range(start, start + count)))
        start += count
    return tuple(held)


def node_bytes(
    model: ModelProfile, groups: Sequence[GroupsOfLayer], slices: Sequence[int], kept: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Weights that each node holds, replicas included."""
    totals = []
    for node, head in enumerate(slices):
        held = sum(len(layer[node]) for layer in groups) * model.group_bytes
        held += math.ceil(head * model.head_slice_bytes)
        if node == 0:
            held += model.coordinator_bytes + sum(map(len, kept)) * model.group_bytes
        totals.append(held)
    return tuple(totals)


def group_room(
    model: ModelProfile, coordinator: DeviceProfile, workers: Sequence[Worker], slices: Sequence[int]
) -> list[int]:
    """Groups that fit each node beside its slices of the head; negative where not even those fit."""
    own = coordinator.memory_bytes - model.coordinator_bytes
    memory = (own, *(worker.device.memory_bytes for worker in workers))
    size, group = model.head_slice_bytes, model.group_bytes
    return [(had - math.ceil(count * size)) // group for had, count in zip(memory, slices, strict=True)]
