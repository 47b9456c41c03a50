"""An FFN cut into neuron groups, laid out so that any subset of them can be computed.

``ffn(x) = sum_j down[:, j] * silu(gate[j] . x) * (up[j] . x)`` is a sum over hidden neurons. Groups of
neighbouring neurons are treated as experts: gate and up are seen as (n_groups, group, n_embd) where they
lie, down is laid out anew as (n_groups, n_embd, group), whole quantization blocks at a time, so nothing is
quantized twice. A width that does not divide gets one short last group, padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.gguf import GGML_TYPES
from edge_runtime.engine.weights import INTERLEAVED, TensorContext, Weights, allocate
from edge_runtime.errors import RequestError, UnsupportedModelError

_MIN_GROUPS = 16
# The repack kernels take 8 rows at a time, so gate and up can only be cut there.
_ROW_BLOCK = 8


@dataclass(frozen=True, slots=True)
class GroupedLayer:
    """One layer's FFN as experts. Tensors in ggml's order of axes.

    Attributes:
        gate_up: [n_embd, 2 group_size, n_groups], `INTERLEAVED` rows of gate and up in turn; None where
            they lie apart.
        gate, up: [n_embd, group_size, n_groups]; 0 where `gate_up` serves.
        down: [group_size, n_embd, n_groups].
        padding: neurons of zeros at the end of the last group.
    """

    group_size: int
    n_groups: int
    padding: int
    gate_up: int | None
    gate: int
    up: int
    down: int


def group_unit(weights: Weights, hyperparameters: Hyperparameters) -> int:
    """The number of neurons that every group size must be a multiple of, for this file."""
    layers = range(hyperparameters.n_layers)
    types = {weights.record(f"blk.{layer}.ffn_down.weight").type for layer in layers}
    fused = any(f"blk.{layer}.ffn_gate_up.weight" in weights for layer in layers)
    return max(INTERLEAVED if fused else _ROW_BLOCK, *(GGML_TYPES[type_].block_size for type_ in types))


def default_group_size(n_ff: int, unit: int) -> int:
    """The largest multiple of `unit` that divides `n_ff` into at least 16 equal groups, else `unit`."""
    fitting = [size for size in range(unit, n_ff // _MIN_GROUPS + 1, unit) if n_ff % size == 0]
    return max(fitting, default=unit)


class NeuronGroups:
    """All layers of a model as neuron groups. Holds a second copy of ffn_down, and more only if it must pad.

    Args:
        group_size: neurons in a group; None chooses `default_group_size`.

    Raises:
        RequestError: `group_size` is not a positive multiple of the quantization block.
        UnsupportedModelError: the model's FFN has biases.
    """

    def __init__(
        self, weights: Weights, hyperparameters: Hyperparameters, group_size: int | None = None
    ) -> None:
        unit = group_unit(weights, hyperparameters)
        n_ff = hyperparameters.n_ff
        size = default_group_size(n_ff, unit) if group_size is None else group_size
        if size < 1 or size % unit:
            raise RequestError(f"neuron groups of {size} were asked for; this file needs multiples of {unit}")
        self.group_size = size
        self.n_groups = -(-n_ff // size)
        self.padding = self.n_groups * size - n_ff
        self._weights = weights
        self._hp = hyperparameters
        self._buffers: list[int] = []
        self._context = TensorContext(8 * hyperparameters.n_layers + 8)
        try:
            self.layers = [self._cut(layer) for layer in range(hyperparameters.n_layers)]
        except BaseException:
            self.close()
            raise

    def _cut(self, layer: int) -> GroupedLayer:
        for kind in ("ffn_gate", "ffn_up", "ffn_down"):
            if f"blk.{layer}.{kind}.bias" in self._weights:
                raise UnsupportedModelError(
                    f"blk.{layer}.{kind}.bias: neuron groups need an FFN without biases; run this model dense"
                )
        down = self._down(layer)
        fused = self._weights.get(f"blk.{layer}.ffn_gate_up.weight")
        if fused is not None and not self.padding:
            gate_type = self._weights.record(f"blk.{layer}.ffn_gate.weight").type
            both = self._view(fused, gate_type, 2 * self.group_size)
            return GroupedLayer(self.group_size, self.n_groups, 0, both, 0, 0, down)
        gate, up = (self._rows(layer, kind) for kind in ("ffn_gate", "ffn_up"))
        return GroupedLayer(self.group_size, self.n_groups, self.padding, None, gate, up, down)

    def _view(self, matrix: int, type_: int, rows: int) -> int:
        """A matrix seen as n_groups groups of `rows` rows; shares its memory."""
        row = int(ggml.row_size(type_, self._hp.n_embd))
        extents = (self._hp.n_embd, rows, self.n_groups)
        view: int = ggml.view_3d(self._context.pointer, matrix, *extents, row, row * rows, 0)
        ggml.backend_view_init(view)
        return view

    def _rows(self, layer: int, kind: str) -> int:
        name = f"blk.{layer}.{kind}.weight"
        type_ = self._weights.record(name).type
        if not self.padding:
            return self._view(self._weights[name], type_, self.group_size)
        rows = np.frombuffer(self._weights.bytes_in_file(name), np.uint8).reshape(self._hp.n_ff, -1)
        padded = np.pad(rows, ((0, self.padding), (0, 0)))
        return self._store(padded, type_, (self._hp.n_embd, self.group_size, self.n_groups), self.group_size)

    def _down(self, layer: int) -> int:
        name = f"blk.{layer}.ffn_down.weight"
        type_ = self._weights.record(name).type
        block = GGML_TYPES[type_]
        group_bytes = self.group_size // block.block_size * block.block_bytes
        rows = np.frombuffer(self._weights.bytes_in_file(name), np.uint8).reshape(self._hp.n_embd, -1)
        missing = self.n_groups * group_bytes - rows.shape[1]
        if missing:
            rows = np.pad(rows, ((0, 0), (0, missing)))
        by_group = rows.reshape(self._hp.n_embd, self.n_groups, group_bytes).transpose(1, 0, 2)
        extents = (self.group_size, self._hp.n_embd, self.n_groups)
        return self._store(np.ascontiguousarray(by_group), type_, extents, self._hp.n_embd)

    def _store(
        self, values: NDArray[np.uint8], type_: int, extents: tuple[int, int, int], n_rows: int
    ) -> int:
        """A new tensor with these values, repacked where the CPU has kernels for it."""
        kinds = self._weights.repack_types
        repacked = kinds is not None and kinds.takes(type_, n_rows)
        buffer_type = kinds.buffer_type if kinds is not None and repacked else ggml.backend_cpu_buffer_type()
        buffer = allocate(int(buffer_type or 0), values.nbytes, "neuron groups")
        self._buffers.append(buffer)
        tensor: int = ggml.new_tensor_3d(self._context.pointer, type_, *extents)
        ggml.backend_tensor_alloc(buffer, tensor, ggml.backend_buffer_get_base(buffer))
        ggml.backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        return tensor

    def close(self) -> None:
        """Free the copies; graphs that use them must be gone."""
        for buffer in self._buffers:
            ggml.backend_buffer_free(buffer)
        self._buffers.clear()
        self._context.free()
