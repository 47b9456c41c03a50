"""How fast this device computes a share, measured on one of random weights."""

from __future__ import annotations

import time
from contextlib import closing
from statistics import median

import numpy as np

from edge_runtime.engine.backend import Backend
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.shares import ShareComputer

_SHARES = 4  # in turn, so that no weights stay in a cache between two runs
_RUNS = 9  # of each


def measure_share(shape: PartitionShape, backend: Backend) -> float:
    """Bytes of weights per second that a share with all groups of layer 0 multiplies with one vector."""
    rng = np.random.default_rng(0)
    with closing(ShareComputer(shape, backend)) as computer:
        # Zeros: the kernels' speed does not depend on values, and random blocks may hold NaN scales.
        content = {group: bytes(shape.group_bytes(0, group)) for group in range(shape.n_groups)}
        shares = []
        try:
            shares += [computer.share(0, content) for _ in range(_SHARES)]
            inputs = rng.standard_normal((1, shape.n_embd)).astype(np.float32)
            times = []
            for run in range(_RUNS):
                for share in shares:
                    started = time.perf_counter()
                    computer.compute(share, inputs)
                    if run:  # the first one builds the graph
                        times.append(time.perf_counter() - started)
            return shares[0].nbytes / median(times)
        finally:
            for share in shares:
                share.close()
