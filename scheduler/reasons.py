"""Why a plan is as it is, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scheduler.timing import TimeModel

if TYPE_CHECKING:
    from scheduler.search import Draft


def _milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def _all_devices(count: int) -> str:
    return "both devices are" if count == 2 else f"all {count} devices are"


def reason_for(time: TimeModel, chosen: Draft, alone: Draft | None, best: Draft | None) -> str:
    """One sentence: how many devices are used and why.

    Args:
        alone: the coordinator by itself; None where the model does not fit.
        best: the best cut over several devices; None where there is none.
    """
    total = 1 + len(time.workers)
    if total == 1:
        return "1 device is used: there is no other"
    used = (chosen.counts[:, 1:].any(axis=0)) | (np.array(chosen.head[1:]) > 0)
    count = 1 + int(used.sum())
    if count == 1:
        if all(worker.device.memory_bytes < time.model.group_bytes for worker in time.workers):
            return f"1 of {total} devices is used: no other has room for a single neuron group"
        several = (
            f"with others it would take {_milliseconds(best.seconds)}" if best else "none would save time"
        )
        return (
            f"1 of {total} devices is used: {time.coordinator.name} alone takes "
            f"{_milliseconds(chosen.seconds)} a token, {several}"
        )
    left_out = np.flatnonzero(~used)
    if len(left_out):
        return f"{count} of {total} devices are used: {_left_out(time, left_out.tolist())}"
    if alone is None:
        return f"{_all_devices(count)} used: the model does not fit {time.coordinator.name} alone"
    return (
        f"{_all_devices(count)} used: {_milliseconds(chosen.seconds)} a token, "
        f"{_milliseconds(alone.seconds)} on {time.coordinator.name} alone"
    )


def _left_out(time: TimeModel, nodes: list[int]) -> str:
    """Why the worker with the slowest link is left out."""
    slowest = max(nodes, key=lambda node: float(time.outward[node] + time.back[node]))
    name = time.workers[slowest].device.name
    if time.workers[slowest].device.memory_bytes < time.model.group_bytes:
        return f"{name} has no room for a single neuron group"
    travel = float(time.outward[slowest] + time.back[slowest])
    computing = float(time.group[slowest] + time.share_overhead[slowest])
    if travel >= computing:
        return f"the link to {name} ({_milliseconds(travel)}) costs more than its share saves"
    return f"{name} ({_milliseconds(computing)} for one neuron group) is too slow to save time"
