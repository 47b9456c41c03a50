"""How vectors travel between devices: as the kernels themselves quantize them, so that nothing is lost.

A kernel that multiplies a quantized matrix first quantizes the vector, in blocks. That form, a quarter of
float32's size, can be sent instead of the vector: quantizing what it decodes to gives the same again,
because the largest value of a block decodes exactly to 127 steps. (The float32 scales of Q8_K may differ in
their last bit.)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.tensor_types import GGML_TYPES
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

_Q8_K_BLOCK = np.dtype([("d", "<f4"), ("quants", "i1", 256), ("sums", "<i2", 16)])


class ActivationForm(IntEnum):
    """How activations are written: float32, float16, or 8 bits in blocks of 32 (Q8_0) or 256 (Q8_K)."""

    F32 = 0
    F16 = 1
    Q8_0 = 2
    Q8_K = 3


_TYPE = {
    ActivationForm.F32: ggml.TYPE_F32,
    ActivationForm.F16: ggml.TYPE_F16,
    ActivationForm.Q8_0: ggml.TYPE_Q8_0,
    ActivationForm.Q8_K: ggml.TYPE_Q8_K,
}
_FORM = {
    ggml.TYPE_F16: ActivationForm.F16,
    ggml.TYPE_Q8_0: ActivationForm.Q8_0,
    ggml.TYPE_Q8_1: ActivationForm.Q8_0,  # the same values, with their sum beside them
    ggml.TYPE_Q8_K: ActivationForm.Q8_K,
}


def kernel_form(ggml_type: int) -> ActivationForm:
    """The form that the kernel makes of a vector it multiplies with a matrix of this type."""
    return _FORM.get(int(ggml.get_type_traits_cpu(ggml_type).contents.vec_dot_type), ActivationForm.F32)


def encoded_bytes(form: ActivationForm, n_rows: int, n: int) -> int:
    """Size of `n_rows` vectors of `n` values.

    Raises:
        RequestError: the form needs a multiple of its block.
    """
    kind = GGML_TYPES[_TYPE[form]]
    if n % kind.block_size:
        raise RequestError(f"vectors of {n} values; {form.name} needs a multiple of {kind.block_size}")
    return n_rows * n // kind.block_size * kind.block_bytes


def encode(form: ActivationForm, values: Floats) -> bytes:
    """Write vectors, (n_rows, n) float32.

    Raises:
        RequestError: the form needs a multiple of its block.
    """
    if form is ActivationForm.F32:
        return values.tobytes()
    if form is ActivationForm.F16:
        return values.astype(np.float16).tobytes()
    values = np.ascontiguousarray(values, np.float32)
    target = np.empty(encoded_bytes(form, *values.shape), np.uint8)
    _from_float(form)(values.ctypes.data, target.ctypes.data, values.size)
    return target.tobytes()


def decode(form: ActivationForm, content: bytes | bytearray | memoryview, n_rows: int, n: int) -> Floats:
    """Read vectors back, (n_rows, n) float32.

    Raises:
        RequestError: another number of bytes than these vectors have.
    """
    if len(content) != encoded_bytes(form, n_rows, n):
        raise RequestError(
            f"{len(content)} bytes for {n_rows} vectors of {n} values in {form.name}; needed are "
            f"{encoded_bytes(form, n_rows, n)}"
        )
    if form is ActivationForm.F32:
        return np.frombuffer(content, "<f4").reshape(n_rows, n)
    if form is ActivationForm.F16:
        return np.frombuffer(content, "<f2").astype(np.float32).reshape(n_rows, n)
    if form is ActivationForm.Q8_K:
        blocks = np.frombuffer(content, _Q8_K_BLOCK)
        scaled: Floats = (blocks["quants"] * blocks["d"][:, None]).astype(np.float32)
        return scaled.reshape(n_rows, n)
    values = np.empty((n_rows, n), np.float32)
    source = np.frombuffer(content, np.uint8)
    _to_float(form)(source.ctypes.data, values.ctypes.data, values.size)
    return values


@cache
def _from_float(form: ActivationForm) -> Callable[[int, int, int], None]:
    return ggml.CONVERT(ggml.get_type_traits_cpu(_TYPE[form]).contents.from_float)


@cache
def _to_float(form: ActivationForm) -> Callable[[int, int, int], None]:
    return ggml.CONVERT(ggml.get_type_traits(_TYPE[form]).contents.to_float)
