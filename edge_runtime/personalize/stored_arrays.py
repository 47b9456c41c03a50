"""Low-rank changes and solutions as rows of a database: little-endian numbers, their lengths and a checksum.

The storage of small devices does lose bits. What was written is read again exactly, or not at all.
"""

from __future__ import annotations

import math
import sqlite3
import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import RequestError
from edge_runtime.personalize.records import Solution

Row = tuple[Any, ...]

CHANGE_COLUMNS = "matrix, rank, n_in, n_out, scale, a, b, checksum"
SOLUTION_COLUMNS = "layer, n_keys, n_ff, n_parts, n_embd, keys, parts, deltas, checksum"

MAX_BYTES = 1 << 29  # of one row; SQLite keeps at most 1e9 bytes in one
_MAX_AXIS = 1 << 24
_FLOAT, _INT = np.dtype("<f4"), np.dtype("<i4")


def change_row(change: LowRank) -> Row:
    """A low-rank change in the order of `CHANGE_COLUMNS`.

    Raises:
        RequestError: A and B do not fit together, or hold numbers that are not finite.
    """
    matrix, scale = change.matrix, float(change.scale)
    a, b = _floats(f"A of {matrix}", change.a), _floats(f"B of {matrix}", change.b)
    if a.shape[0] != b.shape[1] or not math.isfinite(scale):
        raise RequestError(
            f"A {a.shape} and B {b.shape} of {matrix} with the scale {scale} are no low-rank change; "
            "needed are (rank, n_in), (n_out, rank) and a finite number"
        )
    if not 0 < len(matrix) <= 63 or "\0" in matrix:
        raise RequestError(f"{matrix[:80]!r} is no name of a matrix; 1 to 63 characters are needed")
    head = (matrix, a.shape[0], a.shape[1], b.shape[0], scale)
    return _row(head, a, b)


def change_of(row: Row) -> LowRank:
    """The low-rank change in a row.

    Raises:
        sqlite3.DatabaseError: the row is not as `change_row` gave it.
    """
    matrix, rank, n_in, n_out, scale = _head(row, 5)
    a = _array(f"A of {matrix}", row[5], _FLOAT, (rank, n_in))
    b = _array(f"B of {matrix}", row[6], _FLOAT, (n_out, rank))
    return LowRank(matrix, a, b, scale)


def solution_row(solution: Solution) -> Row:
    """A solution in the order of `SOLUTION_COLUMNS`.

    Raises:
        RequestError: its arrays do not fit together, or hold numbers that are not finite.
    """
    keys, deltas = _floats("keys", solution.keys), _floats("deltas", solution.deltas)
    parts = np.asarray(solution.parts)
    if parts.shape != keys.shape[:1] or parts.dtype.kind not in "iu":
        raise RequestError(
            f"parts are {parts.dtype} {parts.shape}; one whole number for each of {len(keys)} keys is needed"
        )
    if parts.min() < 0 or parts.max() >= len(deltas) or solution.layer < 0:
        raise RequestError(
            f"keys belong to the parts {parts.min()} to {parts.max()} of layer {solution.layer}; "
            f"there are {len(deltas)} parts, and layers from 0 on"
        )
    head = (int(solution.layer), *keys.shape, *deltas.shape)
    return _row(head, keys, parts.astype(_INT), deltas)


def solution_of(row: Row) -> Solution:
    """The solution in a row.

    Raises:
        sqlite3.DatabaseError: the row is not as `solution_row` gave it.
    """
    layer, n_keys, n_ff, n_parts, n_embd = _head(row, 5)
    return Solution(
        layer,
        _array("keys", row[5], _FLOAT, (n_keys, n_ff)),
        _array("parts", row[6], _INT, (n_keys,)),
        _array("deltas", row[7], _FLOAT, (n_parts, n_embd)),
    )


def _floats(what: str, values: ArrayLike) -> NDArray[np.float32]:
    """`values` as finite little-endian float32 of two axes, neither empty."""
    found = np.asarray(values)
    if found.ndim != 2 or 0 in found.shape or max(found.shape) > _MAX_AXIS or found.dtype.kind not in "fiu":
        raise RequestError(f"{what} is {found.dtype} {found.shape}; a matrix of numbers is needed")
    with np.errstate(over="ignore"):
        floats = found.astype(_FLOAT, copy=False)
    if not np.isfinite(floats).all():
        raise RequestError(f"{what} holds numbers that are not finite")
    return floats


def _row(head: Row, *arrays: NDArray[Any]) -> Row:
    blobs = [np.ascontiguousarray(array).tobytes() for array in arrays]
    size = sum(map(len, blobs))
    if size > MAX_BYTES:
        raise RequestError(f"{head[0]!r} has {size} bytes of numbers; at most {MAX_BYTES} are kept")
    return (*head, *blobs, _checksum(head, blobs))


def _head(row: Row, length: int) -> Row:
    """The first columns of a row that is as it was written."""
    *blobs, checksum = row[length:]
    head = row[:length]
    if not all(isinstance(blob, bytes) for blob in blobs) or _checksum(head, blobs) != checksum:
        raise sqlite3.DatabaseError(f"the numbers of {head[0]!r} are not those that were written")
    return head


def _checksum(head: Row, blobs: list[bytes]) -> int:
    checksum = zlib.crc32(repr(head).encode())
    for blob in blobs:
        checksum = zlib.crc32(blob, checksum)
    return checksum


def _array(what: str, blob: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that lies in `blob`; it cannot be written to."""
    needed = math.prod(shape) * dtype.itemsize
    if min(shape) < 1 or len(blob) != needed:
        raise sqlite3.DatabaseError(f"{what} has {len(blob)} bytes; {shape} needs {needed}")
    return np.frombuffer(blob, dtype).reshape(shape)
