"""Random directions that are the same on every processor: integer arithmetic alone makes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def signs(seed: int, step: int, count: int, width: int) -> NDArray[np.float32]:
    """(count, width) of +1 and -1, rows orthogonal as far as that is possible.

    Rows of a Hadamard matrix of the next power of two, drawn without repetition, with columns chosen and
    negated at random: orthogonal for a power of two, nearly so else. A counter-based generator (Philox) makes
    each step's from the seed and the step's number.
    """
    generator = np.random.Philox(key=seed, counter=[0, 0, 0, step])
    order = 1 << max(width - 1, 1).bit_length()
    bits = _bits(generator, width)
    columns = _order(generator, order)[:width]
    rows = np.concatenate([_order(generator, order) for _ in range(-(-count // order))])[:count]
    # Sylvester's matrix: the sign of entry (i, j) is the parity of the bits that i and j share.
    shared = rows[:, None] & columns[None, :]
    for shift in (16, 8, 4, 2, 1):
        shared ^= shared >> np.uint32(shift)
    negative = (shared & np.uint32(1)).astype(np.uint8) ^ bits
    return np.float32(1) - 2 * negative.astype(np.float32)


def _bits(generator: np.random.Philox, count: int) -> NDArray[np.uint8]:
    words = np.atleast_1d(generator.random_raw(-(-count // 64))).astype("<u8")
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:count]


def _order(generator: np.random.Philox, count: int) -> NDArray[np.uint32]:
    """0 .. count - 1 in a random order."""
    words = np.atleast_1d(generator.random_raw(count))
    return np.argsort(words, kind="stable").astype(np.uint32)
