"""Low-rank side paths: W x becomes W x + s * B (A x), on any matrix, several at once, chosen per token.

All adapters of a matrix are stacked into one A and one B; a vector of scales for each token turns the
ranks of the adapters it does not use to zero. Switching adapters between requests, or using different
ones for the rows of one batch, therefore changes an input and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """

    def __init__(
        self,
        adapters: Mapping[str, Sequence[LowRank]],
        weights: Weights,
        hyperparameters: Hyperparameters,
        groups: NeuronGroups | None,
        version: int,
    ) -> None:
        self.version = version
        self.adapters = dict(adapters)
        self.names = frozenset(adapters)
        self._hp = hyperparameters
        stacked: dict[str, list[tuple[str, LowRank]]] = {}
        for name, changes in adapters.items():
            for change in changes:
                self._check(name, change, weights)
                stacked.setdefault(change.matrix, []).append((name, change))
        # matrix -> (adapter, scale) of each rank of the stack
        self._ranks = {
            matrix: [(name, change.scale) for name, change in parts for _ in range(change.a.shape[0])]
            for matrix, parts in stacked.items()
        }
        self._context = TensorContext(3 * len(stacked) + 1)
        self._buffers: list[int] = []
        self.paths: dict[str, SidePath] = {}
        for matrix, parts in stacked.items():
            a = np.concatenate([change.a for _, change in parts]).astype(np.float32)
            b = np.concatenate([change.b for _, change in parts], axis=1).astype(np.float32)
            grouped = None
            if groups is not None and matrix.endswith("ffn_down.weight"):
                padded = np.pad(a, ((0, 0), (0, groups.padding)))
                by_group = padded.reshape(len(a), groups.n_groups, groups.group_size).transpose(1, 0, 2)
                grouped = self._store(by_group)
            self.paths[matrix] = SidePath(len(a), self._store(a), self._store(b), grouped)

    def _check(self, name: str, change: LowRank, weights: Weights) -> None:
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
        none = np.zeros(n_rows, np.float32)
        columns = [strengths.get(name, none) * np.float32(scale) for name, scale in self._ranks[matrix]]
        return np.stack(columns, axis=1)

    def close(self) -> None:
        """Free the side paths; graphs that use them must be gone."""
        for buffer in self._buffers:
            ggml.backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.free()
