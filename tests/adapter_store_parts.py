"""Records, changes and solutions for the tests of the adapter store."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.adapters import LowRank
from edge_runtime.personalize.store import AdapterStore, Solution

MODEL = "a" * 64
OTHER_MODEL = "b" * 64


def change(value: float = 1.0, matrix: str = "blk.1.ffn_down.weight", rank: int = 1) -> LowRank:
    """A change whose numbers, all of them different, depend on `value`."""
    numbers = np.arange(rank * 6, dtype=np.float32).reshape(rank, 6) + np.float32(value)
    return LowRank(matrix, numbers, -numbers[:, :4].T, 0.1 * value)


def solution(n_keys: int = 3) -> Solution:
    generator = np.random.default_rng(0)
    return Solution(
        layer=1,
        keys=generator.standard_normal((n_keys, 6), np.float32),
        parts=np.arange(n_keys, dtype=np.int32) % 2,
        deltas=generator.standard_normal((2, 4), np.float32),
    )


def same(left: LowRank, right: LowRank) -> bool:
    return (
        (left.matrix, left.scale) == (right.matrix, right.scale)
        and left.a.dtype == right.a.dtype == left.b.dtype == right.b.dtype == np.float32
        and np.array_equal(left.a, right.a)
        and np.array_equal(left.b, right.b)
    )


def running(store: AdapterStore, model: str = MODEL) -> int:
    number = store.add("edit", "demo", model, {}).id
    store.begin(number)
    return number


def applied(store: AdapterStore, value: float = 1.0, model: str = MODEL) -> int:
    number = running(store, model)
    assert store.finish(number, "applied", {}, solution(), {number: [change(value)]})
    return number
