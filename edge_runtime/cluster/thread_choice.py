"""How many threads compute shares fastest at this moment.

All threads of a computation wait for the last one. Where another program has one of the cores, that takes a
time slice of the system, some 10 ms, however small the computation is: with two threads a quarter of a layer
of TinyLlama then took 28 ms, with one 9 ms.
"""

from __future__ import annotations

import time
from contextlib import closing

import numpy as np

from edge_runtime.engine.backend import Backend, default_threads
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.shares import ShareComputer

_RUNS = 7  # of which the median counts: some are disturbed, some lucky
_MARGIN = 0.9  # of one thread's time that several must stay below


def fastest_threads(slices: GroupSlices, n_rows: int) -> int:
    """One, or the physical cores, whichever computes a quarter of a layer faster.

    Args:
        n_rows: tokens that will be computed at once.

    Raises:
        OutOfMemoryError: ggml could not start.
    """
    most = default_threads()
    if most == 1:
        return 1
    several = _seconds(slices, n_rows, most)
    return most if several < _MARGIN * _seconds(slices, n_rows, 1) else 1


def _seconds(slices: GroupSlices, n_rows: int, threads: int) -> float:
    shape = slices.shape
    groups = {group: slices.group(0, group) for group in range(max(1, shape.n_groups // 4))}
    inputs = np.random.default_rng(0).standard_normal((n_rows, shape.n_embd), np.float32)
    times = []
    with (
        closing(Backend(threads)) as backend,
        closing(ShareComputer(shape, backend)) as computer,
        closing(computer.share(0, groups)) as share,
    ):
        computer.compute(share, inputs)  # builds the graph
        for _ in range(_RUNS):
            start = time.perf_counter()
            computer.compute(share, inputs)
            times.append(time.perf_counter() - start)
    return sorted(times)[_RUNS // 2]
