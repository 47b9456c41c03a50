"""A bounds-checked reader of GGUF files (versions 2 and 3, little-endian), over a memory map.

Every count, length and offset is checked against the size of the file before anything is allocated or
read, so that no file, however damaged or hostile, costs more than time and memory in proportion to
its own size. What a file says about a model is judged in `architecture` and `tokenizer`; here only
the container is. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from struct import Struct, error
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.tensor_types import GGML_TYPES, TensorRecord, TensorType
from edge_runtime.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError

__all__ = ["GGML_TYPES", "GGUFFile", "MetadataValue", "TensorRecord", "TensorType"]

MetadataValue = bool | int | float | str | list[str] | NDArray[Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17  # the largest published models have some thousands
_MAX_STRINGS = 1 << 21  # in one array; the largest vocabularies have 0.5 million merges
_MAX_KEY_LENGTH = 1 << 16  # the format's own bound
_MAX_NAME_LENGTH = 63  # ggml keeps names in 64 bytes with a closing zero
_MAX_AXES = 4
_DEFAULT_ALIGNMENT = 32

_U32, _U64, _TYPE_AND_COUNT = Struct("<I"), Struct("<Q"), Struct("<IQ")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NAMES = "uint8 int8 uint16 int16 uint32 int32 float32 bool string array uint64 int64 float64"
_TYPE_NAMES = dict(enumerate(_NAMES.split()))
_SCALARS = {
    number: Struct(f"<{code}")
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, _BOOL, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_FLOATS = (6, 12)
_SMALLEST = 24  # bytes: magic, version, two counts


class _KeyValue(NamedTuple):
    """Where one key-value pair lies: its whole encoding, and its value or array elements."""

    start: int
    end: int
    type: int
    element_type: int
    n_elements: int
    value: int  # offset of the scalar, of the string's length, or of the first element

    @property
    def type_name(self) -> str:
        if self.type == _ARRAY:
            return f"array of {self.n_elements} {_TYPE_NAMES[self.element_type]}"
        return _TYPE_NAMES[self.type]


class _Metadata(Mapping[str, MetadataValue]):
    """The metadata, decoded when asked for: vocabularies are large and rarely wanted as Python lists."""

    def __init__(self, gguf: GGUFFile, pairs: Mapping[str, _KeyValue]) -> None:
        self._gguf = gguf
        self._pairs = pairs

    def __getitem__(self, key: str) -> MetadataValue:
        return self._gguf._decode(self._pairs[key])

    def __contains__(self, key: object) -> bool:
        return key in self._pairs

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


class GGUFFile:
    """An open GGUF file. A context manager.

    Attributes:
        path: where it was opened.
        version: 2 or 3.
        metadata: key -> value; strings that are not UTF-8 come with replacement characters, arrays of
            numbers as numpy arrays, arrays of strings as lists. Decoded at each access.
        tensors: name -> record, in the file's order; sizes are positive, lie in the file and do not overlap.

    Raises:
        ModelNotFoundError: no such file.
        ModelFileError: it cannot be read, is no GGUF, is truncated or contradicts itself.
        UnsupportedModelError: a version, byte order or tensor type that the engine does not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        self._size = len(self._map)
        self._view = memoryview(self._map)
        self._pairs: dict[str, _KeyValue] = {}
        try:
            self._position = 0
            n_tensors, n_pairs = self._read_header()
            for index in range(n_pairs):
                self._read_pair(index)
            self.alignment = self._read_alignment()
            records = [self._read_tensor(index) for index in range(n_tensors)]
            self.tensors: Mapping[str, TensorRecord] = self._place_tensors(records)
        except (error, OverflowError) as fault:
            self.close()
            raise self._damaged("the file ends inside its header") from fault
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, MetadataValue] = _Metadata(self, self._pairs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file; safe to call twice.

        Where views from `tensor_bytes` are still in use, the map goes when the last of them does.
        """
        with suppress(BufferError):
            self._view.release()
            self._map.close()

    # --- reading the header -------------------------------------------------------------------

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}; the file is damaged or incomplete, download it again")

    def _read_header(self) -> tuple[int, int]:
        head = bytes(self._view[:8])
        if head[:4] != _MAGIC:
            raise ModelFileError(
                f"{self.path} starts with {head[:4]!r}, a GGUF file starts with {_MAGIC!r}; "
                "give a GGUF model file (other formats must be converted first)"
            )
        (self.version,) = _U32.unpack_from(head, 4)
        if self.version not in _VERSIONS:
            swapped = int.from_bytes(head[4:8], "big")
            what = f"GGUF version {self.version}"
            if swapped in _VERSIONS:
                what = f"big-endian GGUF version {swapped}"
            raise UnsupportedModelError(
                f"{self.path} is {what}; little-endian versions 2 and 3 can be read: convert the model again"
            )
        n_tensors, n_pairs = self._unpack(_U64), self._unpack(_U64, at=16)
        if n_tensors > _MAX_TENSORS or n_pairs > _MAX_KEYS:
            raise self._damaged(
                f"its header announces {n_tensors} tensors and {n_pairs} keys; at most {_MAX_TENSORS} and "
                f"{_MAX_KEYS} are read"
            )
        return n_tensors, n_pairs

    def _unpack(self, layout: Struct, at: int = 8) -> int:
        """One number of the fixed header; the position moves past it."""
        self._position = at + layout.size
        return int(layout.unpack_from(self._map, at)[0])

    def _take(self, layout: Struct) -> int:
        """The next number."""
        number = layout.unpack_from(self._map, self._position)[0]
        self._position += layout.size
        return int(number)

    def _take_text(self, what: str, longest: int) -> str:
        """The next string, which must be UTF-8, not empty and without NUL."""
        length = self._take(_U64)
        start, end = self._position, self._position + length
        if end > self._size:
            raise self._damaged(f"{what} would be {length} bytes long and end behind the end of the file")
        if not 0 < length <= longest:
            raise self._damaged(f"{what} is {length} bytes long, 1 to {longest} are allowed")
        raw = bytes(self._view[start:end])
        self._position = end
        try:
            text = raw.decode()
        except UnicodeDecodeError as fault:
            raise self._damaged(f"{what} is not UTF-8 text ({raw[:64]!r})") from fault
        if "\0" in text:
            raise self._damaged(f"{what} holds a NUL character ({text[:64]!r})")
        return text

    def _read_pair(self, index: int) -> None:
        start = self._position
        key = self._take_text(f"the name of key {index}", _MAX_KEY_LENGTH)
        if key in self._pairs:
            raise self._damaged(f"key {key!r} occurs twice")
        type_ = self._take(_U32)
        element_type, count = type_, 1
        value = self._position
        if type_ == _ARRAY:
            element_type, count = _TYPE_AND_COUNT.unpack_from(self._map, value)
            value += _TYPE_AND_COUNT.size
        if element_type == _STRING:
            end = self._end_of_strings(key, value, count)
        elif element_type in _SCALARS:
            end = value + count * _SCALARS[element_type].size
        else:
            kind = "arrays of arrays are" if element_type == _ARRAY else f"type {element_type} is"
            raise self._damaged(f"the value of key {key!r}: {kind} not part of a model file")
        if end > self._size:
            raise self._damaged(
                f"the value of key {key!r} ({count} elements) ends behind the end of the file"
            )
        self._position = end
        self._pairs[key] = _KeyValue(start, end, type_, element_type, count, value)

    def _end_of_strings(self, key: str, position: int, count: int) -> int:
        if count > _MAX_STRINGS or count > (self._size - position) // _U64.size:
            raise self._damaged(
                f"key {key!r} announces {count} strings; there is room for "
                f"{(self._size - position) // _U64.size} and at most {_MAX_STRINGS} are read"
            )
        # Vocabularies hold hundreds of thousands of strings: this loop is most of the time to open a
        # file (about 0.1 us a string). An offset behind the end raises struct.error by itself.
        data, unpack = self._map, _U64.unpack_from
        for _ in range(count):
            position += 8 + unpack(data, position)[0]
        return int(position)

    def _read_alignment(self) -> int:
        alignment = self.get_int("general.alignment", default=_DEFAULT_ALIGNMENT)
        # The format asks for multiples of 8; ggml computes with powers of two.
        if not 8 <= alignment <= 1 << 30 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}, a power of two from 8 on is needed")
        return alignment

    def _read_tensor(self, index: int) -> TensorRecord:
        name = self._take_text(f"the name of tensor {index}", _MAX_NAME_LENGTH)
        n_axes = self._take(_U32)
        if n_axes > _MAX_AXES:
            raise self._damaged(f"tensor {name!r} has {n_axes} axes, at most {_MAX_AXES} are allowed")
        shape = tuple(self._take(_U64) for _ in range(n_axes)) or (1,)
        type_, offset = self._take(_U32), self._take(_U64)
        kind = GGML_TYPES.get(type_)
        if kind is None:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} has type {type_}, which this version does not know; "
                "choose another quantization of the model"
            )
        if min(shape) < 1:
            raise self._damaged(f"tensor {name!r} has the shape {shape}; every axis must be at least 1 long")
        if shape[0] % kind.block_size:
            raise self._damaged(
                f"tensor {name!r} has rows of {shape[0]} elements, {kind.name} needs a multiple of "
                f"{kind.block_size}"
            )
        size = math.prod(shape) // kind.block_size * kind.block_bytes
        return TensorRecord(name, type_, shape, offset, size)

    def _place_tensors(self, records: list[TensorRecord]) -> dict[str, TensorRecord]:
        """Records with offsets in the file, after checking where they lie."""
        start = -(-self._position // self.alignment) * self.alignment
        placed: dict[str, TensorRecord] = {}
        for record in records:
            name, first = record.name, start + record.offset
            if name in placed:
                raise self._damaged(f"tensor {name!r} occurs twice")
            if record.offset % self.alignment:
                raise self._damaged(
                    f"tensor {name!r} starts at offset {record.offset}, not a multiple of {self.alignment}"
                )
            if first + record.size > self._size:
                raise self._damaged(
                    f"tensor {name!r} needs bytes {first} to {first + record.size}, "
                    f"the file ends at {self._size}"
                )
            placed[name] = replace(record, offset=first)
        by_offset = sorted(placed.values(), key=lambda record: record.offset)
        for lower, upper in pairwise(by_offset):
            if lower.offset + lower.size > upper.offset:
                raise self._damaged(f"tensors {lower.name!r} and {upper.name!r} overlap")
        return placed

    # --- values -------------------------------------------------------------------------------

    def _decode(self, pair: _KeyValue) -> MetadataValue:
        if pair.type == _STRING:
            return str(self._strings(pair)[0], "utf-8", "replace")
        if pair.type != _ARRAY:
            value: bool | int | float = _SCALARS[pair.type].unpack_from(self._map, pair.value)[0]
            return value
        if pair.element_type == _STRING:
            return [str(text, "utf-8", "replace") for text in self._strings(pair)]
        raw = bytes(self._view[pair.value : pair.end])
        if pair.element_type == _BOOL:
            truths: NDArray[Any] = np.frombuffer(raw, np.uint8) != 0
            return truths
        numbers: NDArray[Any] = np.frombuffer(raw, np.dtype(_SCALARS[pair.element_type].format))
        return numbers

    def _strings(self, pair: _KeyValue) -> list[bytes]:
        data, unpack, position = self._map, _U64.unpack_from, pair.value
        found = []
        for _ in range(pair.n_elements):
            start = position + 8
            position = start + unpack(data, position)[0]
            found.append(data[start:position])
        return found

    def tensor_bytes(self, name: str) -> memoryview:
        """The tensor's values as they lie in the file: a read-only view of the map, nothing is copied.

        Raises:
            ModelFileError: no tensor of this name.
        """
        record = self.tensors.get(name)
        if record is None:
            raise ModelFileError(f"{self.path} has no tensor {name!r}")
        return self._view[record.offset : record.offset + record.size]

    def key_value_bytes(self, key: str) -> bytes:
        """One key-value pair exactly as encoded in the file, for copying it to another GGUF.

        Raises:
            ModelFileError: no such key.
        """
        pair = self._pair(key, "a value")
        return bytes(self._view[pair.start : pair.end])

    def get_int(
        self,
        key: str,
        default: int | None = None,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int:
        """The integer at `key`, of any width; `default` where the key is absent (None: it is required).

        Raises:
            ModelFileError: absent, of another type, or out of range.
        """
        pair = self._pairs.get(key)
        if pair is None and default is not None:
            return default
        pair = self._pair(key, "an integer", _INTEGERS)
        value = int(_SCALARS[pair.type].unpack_from(self._map, pair.value)[0])
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise ModelFileError(f"{self.path}: {key} is {value}; {_range(minimum, maximum)} is needed")
        return value

    def get_float(
        self,
        key: str,
        default: float | None = None,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float:
        """The floating-point number at `key`, always finite; `default` where the key is absent.

        Raises:
            ModelFileError: absent, of another type, not finite, or out of range.
        """
        if key not in self._pairs and default is not None:
            return default
        pair = self._pair(key, "a floating-point number", _FLOATS)
        value = float(_SCALARS[pair.type].unpack_from(self._map, pair.value)[0])
        low = -math.inf if minimum is None else minimum
        high = math.inf if maximum is None else maximum
        if not (math.isfinite(value) and low <= value <= high):
            raise ModelFileError(f"{self.path}: {key} is {value}; {_range(minimum, maximum)} is needed")
        return value

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        """The truth value at `key`; `default` where the key is absent (None: it is required).

        Raises:
            ModelFileError: absent, or of another type.
        """
        if key not in self._pairs and default is not None:
            return default
        pair = self._pair(key, "a bool", (_BOOL,))
        return bool(_SCALARS[_BOOL].unpack_from(self._map, pair.value)[0])

    def get_str(self, key: str, default: str | None = None) -> str:
        """The string at `key`; `default` where the key is absent (None: it is required).

        Raises:
            ModelFileError: absent, of another type, or not UTF-8.
        """
        if key not in self._pairs and default is not None:
            return default
        raw = self._strings(self._pair(key, "a string", (_STRING,)))[0]
        try:
            return raw.decode()
        except UnicodeDecodeError as fault:
            raise self._damaged(f"{key} is not UTF-8 text") from fault

    def get_array(self, key: str) -> NDArray[Any]:
        """The array of numbers (n,) at `key`, copied, in the file's own dtype.

        Raises:
            ModelFileError: absent, no array, or an array of strings.
        """
        pair = self._pair(key, "an array of numbers", (_ARRAY,))
        if pair.element_type == _STRING:
            raise ModelFileError(f"{self.path}: {key} is an {pair.type_name}; an array of numbers is needed")
        values = self._decode(pair)
        assert isinstance(values, np.ndarray)
        return values

    def get_strings(self, key: str) -> list[bytes]:
        """The array of strings at `key` as the file has them; whether they are UTF-8 is not checked.

        Raises:
            ModelFileError: absent, or no array of strings.
        """
        pair = self._pair(key, "an array of strings", (_ARRAY,))
        if pair.element_type != _STRING:
            raise ModelFileError(f"{self.path}: {key} is an {pair.type_name}; an array of strings is needed")
        return self._strings(pair)

    def array_length(self, key: str) -> int:
        """Number of elements of the array at `key`, which is not decoded.

        Raises:
            ModelFileError: absent, or no array.
        """
        return self._pair(key, "an array", (_ARRAY,)).n_elements

    def type_name(self, key: str) -> str:
        """What the file has at `key`, in words: "uint32", "array of 32 float32", "nothing"."""
        pair = self._pairs.get(key)
        return "nothing" if pair is None else pair.type_name

    def _pair(self, key: str, needed: str, types: tuple[int, ...] | None = None) -> _KeyValue:
        pair = self._pairs.get(key)
        if pair is None or (types is not None and pair.type not in types):
            raise ModelFileError(
                f"{self.path}: {key} is {self.type_name(key)}; {needed} is needed: convert the model again"
            )
        return pair


def _range(minimum: float | None, maximum: float | None) -> str:
    if minimum is None and maximum is None:
        return "a finite number"
    if maximum is None:
        return f"at least {minimum}"
    return f"at most {maximum}" if minimum is None else f"{minimum} to {maximum}"


def _map_file(path: Path) -> mmap.mmap:
    """Map a regular file for reading, without waiting on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as fault:
        raise ModelNotFoundError(f"there is no file {path}; give the path of a GGUF file") from fault
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else fault
        raise ModelFileError(f"{path} cannot be opened: {reason}") from fault
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ModelFileError(f"{path} is {kind}; give the path of a GGUF file")
        if status.st_size < _SMALLEST:
            raise ModelFileError(
                f"{path} has {status.st_size} bytes, a GGUF file has at least {_SMALLEST}; download it again"
            )
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (OSError, OverflowError) as fault:
        raise ModelFileError(f"{path} cannot be mapped: {fault}") from fault
    finally:
        os.close(descriptor)
