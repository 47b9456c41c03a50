"""A matrix's rows as float32, by ggml's own conversions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.gguf import GGUFFile


def rows_as_floats(gguf: GGUFFile, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows ``start`` to ``stop`` of a tensor, (stop - start, n_in); without `stop`, to its end."""
    record = gguf.tensors[name]
    n_in, n_rows = record.shape[0], math.prod(record.shape[1:])
    chosen = np.frombuffer(gguf.tensor_bytes(name), np.uint8).reshape(n_rows, -1)[start:stop]
    if record.type == ggml.TYPE_F32:
        return chosen.view(np.float32).copy()
    values = np.empty((len(chosen), n_in), np.float32)
    convert = ggml.CONVERT(ggml.get_type_traits(record.type).contents.to_float)
    convert(chosen.ctypes.data, values.ctypes.data, values.size)
    return values
