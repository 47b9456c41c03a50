"""Measured profiles for the scheduler: this device, the others, the links to them, and the model's parts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

from edge_runtime.cluster.exchange import Link
from edge_runtime.engine.activations import encoded_bytes, kernel_form
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import PartitionShape
from scheduler.profiles import LinkProfile, ModelProfile

_PINGS = 40
_PING_SECONDS = 0.012  # between two to the same worker
_LAST_PING_SECONDS = 0.3  # for the last ones to come back
# A worker of whose pings fewer came back has no datagrams.
_LEAST_PONGS = 8
# The coordinator's own work for one exchange: quantizing, sealing, sending, opening, adding. Measured.
EXCHANGE_SECONDS = 100e-6
_ANSWER_BYTES = 4  # of a value in an exact answer
_RELAXED_ANSWER_BYTES = 34 / 32


def model_profile(shape: PartitionShape, gguf: GGUFFile, *, exact: bool) -> ModelProfile:
    """Sizes of a model's parts and of what travels for one token."""
    sizes = {name: record.size for name, record in gguf.tensors.items()}
    in_layers = {name: size for name, size in sizes.items() if name.startswith("blk.")}
    attention = sum(size for name, size in in_layers.items() if ".ffn_" not in name)
    fixed = sum(sizes.values()) - sum(in_layers.values()) - sizes.get("output.weight", 0)
    positions = product(range(shape.n_layers), range(shape.n_groups))
    groups = sum(shape.group_bytes(layer, group) for layer, group in positions)
    head = sum(map(shape.head_slice_bytes, range(shape.n_head_slices)))
    answer = _ANSWER_BYTES if exact else _RELAXED_ANSWER_BYTES
    return ModelProfile(
        n_layers=shape.n_layers,
        n_groups=shape.n_groups,
        group_bytes=math.ceil(groups / shape.n_layers / shape.n_groups),
        attention_bytes=math.ceil(attention / shape.n_layers),
        head_bytes=head,
        n_head_slices=shape.n_head_slices,
        fixed_bytes=fixed,
        input_bytes=encoded_bytes(kernel_form(shape.types[0][0]), 1, shape.n_embd),
        output_bytes=math.ceil(answer * shape.n_embd),
        group_neurons=shape.group_size,
        head_slice_output_bytes=math.ceil(answer * shape.head_slice_rows),
    )


def ping_all(
    link: Link, workers: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> dict[int, LinkProfile | None]:
    """How the way to each worker is, by datagrams; None where they do not get through. Takes half a second.

    Bandwidth is not measured here: a token's datagrams are too few to fill a link.
    """
    times: dict[int, list[float]] = {worker: [] for worker in workers}
    before = {worker: link.statistics(worker).received for worker in workers}
    for _ in range(_PINGS):
        for worker in workers:
            link.ping(worker)
        _take_pongs(link, times, clock() + _PING_SECONDS, clock)
    _take_pongs(link, times, clock() + _LAST_PING_SECONDS, clock)
    pongs = {worker: link.statistics(worker).received - before[worker] for worker in workers}
    return {worker: _profile(times[worker], pongs[worker]) for worker in workers}


def _take_pongs(link: Link, times: dict[int, list[float]], end: float, clock: Callable[[], float]) -> None:
    waiting = set(times)
    before = {worker: link.last_seen(worker) for worker in times}
    while waiting and (left := end - clock()) > 0:
        link.receive(min(left, 0.002))
        for worker in list(waiting):
            if link.last_seen(worker) != before[worker]:
                waiting.discard(worker)
                times[worker].append(link.round_trips(worker))


def _profile(times: Sequence[float], pongs: int) -> LinkProfile | None:
    found = [seconds for seconds in times if math.isfinite(seconds)]
    if len(found) < _LEAST_PONGS:
        return None
    # A ping and its answer are two datagrams.
    loss = 1.0 - math.sqrt(min(pongs / _PINGS, 1.0))
    return LinkProfile(
        round_trip_seconds=statistics.median(found),
        jitter_seconds=statistics.pstdev(found),
        loss=min(loss, 0.9),
        overhead_seconds=EXCHANGE_SECONDS,
    )
