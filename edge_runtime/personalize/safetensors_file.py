"""Safetensors files: matrices of numbers by name (https://github.com/huggingface/safetensors, "Format").

Eight bytes say how long the header is; the header is JSON, name -> dtype, shape and place; then come the
numbers, without gaps. Reading one is the few lines below; the library of that name has no BF16 for numpy,
in which most published adapters are, and takes the last of two equal names.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import AdapterFileError

_MAX_HEADER = 1 << 24  # bytes; an adapter of a thousand layers has one of 2 MB
_MAX_JSON = 1 << 20  # bytes of a configuration
_MAX_AXES = 8
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16: the upper half of a float32
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def encode_safetensors(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """A file's content, in F32; the numbers start at a multiple of eight bytes."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    body = []
    start = 0
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values, "<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [start, start + len(raw)],
        }
        body.append(raw)
        start += len(raw)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _LENGTH.size)
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *body])


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a file, F32, F16 or BF16, as float32; nothing in it is trusted.

    Raises:
        AdapterFileError: it cannot be read or is damaged, or holds something else than such numbers.
    """
    with _mapped(path) as content:
        header, start = _header(path, content)
        header.pop(_METADATA, None)
        places = {name: _place(path, name, entry) for name, entry in header.items()}
        end = 0
        for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
            if first != end:
                raise damaged(path, f"{name[:80]!r} starts at byte {first} of the numbers, {end} is needed")
            end = last
        if start + end != len(content):
            raise damaged(path, f"it has {len(content)} bytes, its header speaks of {start + end}")
        found = {}
        for name, (dtype, shape, first, _) in places.items():
            raw = np.frombuffer(content, _DTYPES[dtype], math.prod(shape), start + first)
            if dtype == "BF16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            found[name] = raw.astype(np.float32).reshape(shape)
            del raw  # a view would keep the map open
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; no name may occur twice in it.

    Raises:
        AdapterFileError: it cannot be read, or is none.
    """
    with _mapped(path) as content:
        if len(content) > _MAX_JSON:
            raise damaged(path, f"it has {len(content)} bytes; at most {_MAX_JSON} are read")
        return _json_object(path, content[:])


def damaged(path: Path, what: str) -> AdapterFileError:
    """The error for a file that contradicts its format."""
    return AdapterFileError(f"{path}: {what}; the adapter is damaged or incomplete, get it again")


def _mapped(path: Path) -> mmap.mmap:
    """A regular file's content, without waiting on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterFileError(
            f"{path} cannot be opened: {reason}; is it the folder of a PEFT adapter?"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise AdapterFileError(
                f"{path} is no file, or an empty one; is it in the folder of a PEFT adapter?"
            )
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, OverflowError) as error:
        raise AdapterFileError(f"{path} cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)


def _header(path: Path, content: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers start."""
    if len(content) < _LENGTH.size:
        raise damaged(path, f"it has {len(content)} bytes; a safetensors file has at least {_LENGTH.size}")
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size + length
    if length > _MAX_HEADER or start > len(content):
        raise damaged(path, f"its header would be {length} bytes long, of {len(content)} in the file")
    return _json_object(path, content[_LENGTH.size : start]), start


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        found = json.loads(content.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # among them: no UTF-8, numbers of thousands of digits
        raise damaged(path, f"its JSON cannot be read ({str(error)[:80]})") from error
    if not isinstance(found, dict):
        raise damaged(path, f"it holds a JSON {type(found).__name__}, needed is an object")
    return found


def _place(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and first and last byte among the numbers."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(
            path, f"{name[:80]!r} is described by something else than dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterFileError(
            f"{path}: {name[:80]!r} is of the type {str(dtype)[:20]!r}; {', '.join(_DTYPES)} can be read"
        )
    if not _are_counts(shape) or len(shape) > _MAX_AXES or not _are_counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"the shape or the place of {name[:80]!r} is none")
    size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        raise damaged(
            path, f"{name[:80]!r} has {offsets[1] - offsets[0]} bytes; its shape and type need {size}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
