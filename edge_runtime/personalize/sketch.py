"""Keeps what many vectors have in common in few of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sketch:
    """Frequent Directions [1501.01711]: rows ``S`` with ``SᵀS`` close to ``KᵀK`` of all rows ``K`` so far.

    What is cut away each time is at most the smallest of the kept directions' shares: those that matter
    stay.

    Args:
        rows: kept at most.
        width: of a row.
    """

    def __init__(self, rows: int, width: int) -> None:
        self._rows = rows
        self._held = np.zeros((2 * rows, width), np.float32)
        self._used = 0
        self.seen = 0

    def add(self, vectors: NDArray[np.floating]) -> None:
        """Take in (n, width) more."""
        self.seen += len(vectors)
        while len(vectors):
            count = min(len(vectors), len(self._held) - self._used)
            self._held[self._used : self._used + count] = vectors[:count]
            self._used += count
            vectors = vectors[count:]
            if self._used == len(self._held):
                self._shrink()

    def samples(self) -> NDArray[np.float32]:
        """(n, width) rows, at most `rows`, whose mean ``sᵀs`` is that of all vectors."""
        if self._used > self._rows:
            self._shrink()
        kept = self._held[: self._used]
        scaled: NDArray[np.float32] = kept * np.float32(np.sqrt(len(kept) / max(self.seen, 1)))
        return scaled

    def _shrink(self) -> None:
        held = self._held[: self._used]
        narrow = held.shape[1] < len(held)
        # Of the two products with the same eigenvalues the smaller one: this is what takes the time.
        gram = held.T @ held if narrow else held @ held.T
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        order = np.argsort(values)[::-1][: self._rows]
        largest, directions = np.maximum(values[order], 0), vectors[:, order]
        full = len(order) == self._rows
        # Rows of the singular directions; the last one's share is taken from all, so that it becomes free.
        shares = np.sqrt(np.maximum(largest - (largest[-1] if full else 0), 0))
        if narrow:
            rows = (shares * directions).T
        else:
            rows = (shares / np.sqrt(np.maximum(largest, 1e-30)) * directions).T.astype(np.float32) @ held
        self._held[: len(rows)] = rows
        self._used = len(rows) - full
