"""Bookkeeping of the KV cache: which cell holds which position of which sequences.

All sequences share one pool of cells. A cell may belong to several sequences, so that copies of a
sequence share their common prefix and forking one costs no computing. Which cells a token may look
at is decided by the attention mask alone; the kernels skip masked cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ContextOverflowError, RequestError

_FREE = -1


class KVCells:
    """The table of cells; the keys and values themselves lie in the model's tensors.

    Args:
        n_cells: size of the pool.
        n_sequences: sequences are numbered 0 .. n_sequences - 1.
    """

    def __init__(self, n_cells: int, n_sequences: int) -> None:
        self.n_cells = n_cells
        self.n_sequences = n_sequences
        self._position: NDArray[np.int32] = np.full(n_cells, _FREE, np.int32)
        self._member: NDArray[np.bool_] = np.zeros((n_sequences, n_cells), np.bool_)
        self._length = [0] * n_sequences
        self._end = 0  # one past the highest cell in use

    @property
    def end(self) -> int:
        """One past the highest cell in use: attention need not look further."""
        return self._end

    @property
    def n_free(self) -> int:
        """Number of cells that belong to no sequence."""
        return self.n_cells - int(np.count_nonzero(self._position != _FREE))

    def length(self, sequence: int) -> int:
        """One past the last position that `sequence` holds; 0 where it is empty."""
        return self._length[sequence]

    def place(self, sequences: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
        """Cells (n_rows,) for the keys and values of these tokens.

        A position that its sequence already holds is written again in place, which is what running
        further layers of the same tokens needs; if other sequences share that cell, they keep it
        and this one gets a new cell.

        Raises:
            ContextOverflowError: fewer free cells than needed. Nothing was changed.
            RequestError: a sequence number out of range, or a position twice in one batch.
        """
        if sequences.size and (sequences.min() < 0 or sequences.max() >= self.n_sequences):
            raise RequestError(
                f"sequences {sequences.min()}..{sequences.max()} were asked for; "
                f"this model was loaded for {self.n_sequences} (0..{self.n_sequences - 1})"
            )
        cells = np.full(len(positions), _FREE, np.int64)
        for sequence in np.unique(sequences):
            rows = np.flatnonzero(sequences == sequence)
            wanted = positions[rows]
            if len(rows) > 1 and len(np.unique(wanted)) != len(wanted):
                raise RequestError(f"sequence {sequence} has the same position twice in one batch")
            if wanted.min() < self._length[sequence]:
                cells[rows] = self._held(int(sequence), wanted)
        new = np.flatnonzero(cells == _FREE)
        if new.size:
            free = self._free(new.size)
            for sequence in np.unique(sequences[new]):
                self._forget(int(sequence), positions[new[sequences[new] == sequence]])
            cells[new] = free
            self._position[free] = positions[new]
            self._member[sequences[new], free] = True
            self._end = max(self._end, int(free[-1]) + 1)
            for sequence, position in zip(sequences[new].tolist(), positions[new].tolist(), strict=True):
                self._length[sequence] = max(self._length[sequence], position + 1)
        return cells

    def _free(self, count: int) -> NDArray[np.intp]:
        free = np.flatnonzero(self._position == _FREE)
        if len(free) < count:
            raise ContextOverflowError(
                f"{count} tokens need {count} cells of the KV cache and {len(free)} of {self.n_cells} "
                "are free; shorten the prompt, drop older turns, or load the model with a larger context"
            )
        return free[:count]

    def _held(self, sequence: int, wanted: NDArray[np.int32]) -> NDArray[np.int64]:
        """Cells that hold these positions for this sequence alone; _FREE for the others."""
        own = np.flatnonzero(self._member[sequence] & (self._member.sum(axis=0) == 1))
        cell_of = dict(zip(self._position[own].tolist(), own.tolist(), strict=True))
        return np.array([cell_of.get(position, _FREE) for position in wanted.tolist()], np.int64)

    def _forget(self, sequence: int, positions: NDArray[np.int32]) -> None:
        """Leave shared cells of these positions to the sequences that share them."""
        if positions.min() < self._length[sequence]:
            self._member[sequence] &= ~np.isin(self._position, positions)

    def write_mask(
        self, mask: NDArray[np.float16], sequences: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> None:
        """Fill `mask` (n_rows, n_kv): 0 where a token may look at a cell, -inf elsewhere (causal)."""
        n_kv = min(mask.shape[1], self.n_cells)
        visible = self._member[sequences, :n_kv] & (self._position[:n_kv] <= positions[:, None])
        mask[: len(positions), n_kv:] = -np.inf
        mask[: len(positions), :n_kv] = np.where(visible, np.float16(0), np.float16(-np.inf))

    def remove(self, sequence: int, start: int = 0, stop: int | None = None) -> None:
        """Take positions start .. stop - 1 (stop None: to the end) away from `sequence`."""
        going = self._member[sequence] & (self._position >= start)
        if stop is not None:
            going &= self._position < stop
        self._member[sequence, going] = False
        orphaned = going & ~self._member.any(axis=0)
        self._position[orphaned] = _FREE
        used = np.flatnonzero(self._position != _FREE)
        self._end = int(used[-1]) + 1 if used.size else 0
        held = self._position[self._member[sequence]]
        self._length[sequence] = int(held.max()) + 1 if held.size else 0

    def copy(self, source: int, target: int, stop: int | None = None) -> None:
        """Let `target`, emptied first, share positions 0 .. stop - 1 of `source` (stop None: all)."""
        if source == target:
            return
        self.remove(target)
        shared = self._member[source].copy()
        if stop is not None:
            shared &= self._position < stop
        self._member[target] = shared
        held = self._position[shared]
        self._length[target] = int(held.max()) + 1 if held.size else 0
