"""Low-rank side paths: W x becomes W x + s * B (A x), on any matrix, several at once, chosen per token.

All adapters of a matrix are stacked into one A and one B; a vector of scales for each token turns the
ranks of the adapters it does not use to zero. Switching adapters between requests, or using different
ones for the rows of one batch, therefore changes an input and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.gguf import TensorRecord
from edge_runtime.engine.neuron_groups import NeuronGroups
from edge_runtime.engine.weights import EMBEDDING, HEAD, TensorContext, Weights, allocate
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LowRank:
    """One low-rank change of one matrix: ``W + scale * b @ a``.

    Attributes:
        matrix: the GGUF name, for example ``blk.3.ffn_down.weight``.
        a: (rank, n_in) float32.
        b: (n_out, rank) float32.
    """

    matrix: str
    a: Floats
    b: Floats
    scale: float = 1.0


Adapters = Mapping[str, Sequence[LowRank]]  # by name


def version_of(changes: Sequence[LowRank]) -> str:
    """What tells these changes from any others: equal ones have equal versions; 128 bits, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for change in changes:
        a, b = (np.ascontiguousarray(values, "<f4") for values in (change.a, change.b))
        digest.update(f"{change.matrix} {a.shape} {b.shape} {float(change.scale).hex()}\n".encode())
        digest.update(a.data)
        digest.update(b.data)
    return digest.hexdigest()


def check_changes(name: str, changes: Sequence[LowRank], weights: Weights) -> None:
    """Refuse an adapter that does not fit the model.

    Raises:
        RequestError: a matrix the model does not have, a shape that does not fit it, or values that
            are not finite.
    """
    for change in changes:
        record: TensorRecord | None = None
        if change.matrix != EMBEDDING and (change.matrix in weights or change.matrix == HEAD):
            record = weights.record(change.matrix if change.matrix in weights.names else EMBEDDING)
        if record is None or len(record.shape) != 2:
            raise RequestError(f"adapter {name!r}: the model has no matrix {change.matrix!r} to change")
        n_in, n_out = record.shape
        a, b = np.shape(change.a), np.shape(change.b)
        if len(a) != 2 or len(b) != 2 or a[0] < 1 or a[1] != n_in or b != (n_out, a[0]):
            raise RequestError(
                f"adapter {name!r}: A {a} and B {b} do not fit {change.matrix}; "
                f"needed are (rank, {n_in}) and ({n_out}, rank)"
            )
        if not (np.isfinite(change.a).all() and np.isfinite(change.b).all() and np.isfinite(change.scale)):
            raise RequestError(f"adapter {name!r}: {change.matrix} has values that are not finite")


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """All adapters' changes of one matrix, one after the other.

    Attributes:
        parts: (adapter, change), in the order in which their ranks are stacked.
    """

    matrix: str
    parts: tuple[tuple[str, LowRank], ...]

    @property
    def rank(self) -> int:
        """Of all together."""
        return sum(change.a.shape[0] for _, change in self.parts)

    def a(self) -> Floats:
        """(rank, n_in)"""
        return np.concatenate([change.a for _, change in self.parts]).astype(np.float32)

    def b(self) -> Floats:
        """(n_out, rank)"""
        return np.concatenate([change.b for _, change in self.parts], axis=1).astype(np.float32)

    def scales(self, strengths: Mapping[str, Floats], n_rows: int) -> Floats:
        """Scale of each rank for each token, (n_rows, rank); `strengths`: adapter -> (n_rows,)."""
        scales = np.zeros((n_rows, self.rank), np.float32)
        start = 0
        for name, change in self.parts:
            stop = start + change.a.shape[0]
            strength = strengths.get(name)
            if strength is not None:
                scales[:, start:stop] = (strength * np.float32(change.scale))[:, None]
            start = stop
        return scales


def stacks_of(adapters: Adapters) -> dict[str, Stack]:
    """The changes of all adapters, by matrix."""
    parts = [(change.matrix, name, change) for name, changes in adapters.items() for change in changes]
    parts.sort(key=lambda part: part[0])  # stable: adapters stay in their order
    return {
        matrix: Stack(matrix, tuple((name, change) for _, name, change in of))
        for matrix, of in groupby(parts, key=lambda part: part[0])
    }


@dataclass(frozen=True, slots=True)
class SidePath:
    """The stacked side path of one matrix, as tensors: a [n_in, rank], b [rank, n_out]."""

    rank: int
    a: int
    b: int
    a_grouped: int | None  # [group_size, rank, n_groups], for ffn_down with neuron groups


class AdapterBank:
    """The adapters that a model's requests can switch on, by name.

    Args:
        adapters: name -> its low-rank changes.
        groups: the model's neuron groups, where it has them.
        version: a number unlike that of any bank the model had before.

    Raises:
        RequestError: a matrix the model does not have, a shape that does not fit it, or values that
            are not finite.
        OutOfMemoryError: they do not fit.
    """

    def __init__(
        self,
        adapters: Adapters,
        weights: Weights,
        hyperparameters: Hyperparameters,
        groups: NeuronGroups | None,
        version: int,
    ) -> None:
        self.version = version
        self.adapters = dict(adapters)
        self.names = frozenset(adapters)
        for name, changes in adapters.items():
            check_changes(name, changes, weights)
        self._stacks = stacks_of(adapters)
        self._context = TensorContext(3 * len(self._stacks) + 1)
        self._buffers: list[int] = []
        self.paths: dict[str, SidePath] = {}
        try:
            for matrix, stack in self._stacks.items():
                a = stack.a()
                grouped = None
                if groups is not None and matrix.endswith("ffn_down.weight"):
                    padded = np.pad(a, ((0, 0), (0, groups.padding)))
                    by_group = padded.reshape(len(a), groups.n_groups, groups.group_size).transpose(1, 0, 2)
                    grouped = self._store(by_group)
                self.paths[matrix] = SidePath(len(a), self._store(a), self._store(stack.b()), grouped)
        except BaseException:
            self.close()
            raise

    def _store(self, values: NDArray[np.float32]) -> int:
        values = np.ascontiguousarray(values, np.float32)
        buffer = allocate(ggml.backend_cpu_buffer_type(), values.nbytes, "adapters")
        self._buffers.append(buffer)
        extents = (*reversed(values.shape), 1)[:3]
        tensor: int = ggml.new_tensor_3d(self._context.pointer, ggml.TYPE_F32, *extents)
        ggml.backend_tensor_alloc(buffer, tensor, ggml.backend_buffer_get_base(buffer))
        ggml.backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        return tensor

    def scales(self, matrix: str, strengths: Mapping[str, Floats], n_rows: int) -> Floats:
        """Scale of each rank for each token, (n_rows, rank); `strengths`: adapter -> (n_rows,)."""
        return self._stacks[matrix].scales(strengths, n_rows)

    def close(self) -> None:
        """Free the side paths; graphs that use them must be gone."""
        for buffer in self._buffers:
            ggml.backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.free()
