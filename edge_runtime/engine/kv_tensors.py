"""The memory of the KV cache: one tensor of keys and one of values for each layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

from edge_runtime.engine import ggml, memory
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.weights import TensorContext
from edge_runtime.errors import RequestError

KVType = Literal["f16", "f32", "q8_0"]
_TYPES: dict[KVType, int] = {"f16": ggml.TYPE_F16, "f32": ggml.TYPE_F32, "q8_0": ggml.TYPE_Q8_0}


class KVTensors:
    """Keys and values of all layers, (n_rows, n_head_kv * head_dim) each, zero until written.

    Args:
        kv_type: how they are kept: ``f16``, ``f32`` (twice the memory) or ``q8_0`` (half).

    Attributes:
        keys, values: ggml tensors, by layer.
        type: their ggml type.
        nbytes: memory once every row was written.

    Raises:
        RequestError: ``q8_0`` for heads whose width is no multiple of 32.
        OutOfMemoryError: the system refuses that much.
    """

    def __init__(self, hyperparameters: Hyperparameters, n_rows: int, kv_type: KVType) -> None:
        type_ = _TYPES.get(kv_type)
        if type_ is None or hyperparameters.head_dim % int(ggml.blck_size(type_)):
            raise RequestError(
                f"kv_type = {kv_type!r} for heads {hyperparameters.head_dim} wide; possible are "
                f"{', '.join(_TYPES)}, q8_0 for multiples of 32"
            )
        self.type = type_
        self.nbytes = 0
        self._width = hyperparameters.n_head_kv * hyperparameters.head_dim
        self._n_rows = n_rows
        with ExitStack() as resources:
            self._context = TensorContext(2 * hyperparameters.n_layers)
            resources.callback(self._context.free)
            layers = range(hyperparameters.n_layers)
            self.keys = [self._tensor(resources) for _ in layers]
            self.values = [self._tensor(resources) for _ in layers]
            self._resources = resources.pop_all()

    def _tensor(self, resources: ExitStack) -> int:
        values = memory.zeroed(int(ggml.row_size(self.type, self._width)) * self._n_rows)
        buffer = ggml.backend_cpu_buffer_from_ptr(values.ctypes.data, values.nbytes)
        # The callback also keeps the numpy array, and so its memory, until the buffer is freed.
        resources.callback(lambda _: ggml.backend_buffer_free(buffer), values)
        tensor: int = ggml.new_tensor_2d(self._context.pointer, self.type, self._width, self._n_rows)
        ggml.backend_tensor_alloc(buffer, tensor, values.ctypes.data)
        self.nbytes += values.nbytes
        return tensor

    def close(self) -> None:
        """Free the memory; safe to call twice."""
        self._resources.close()
