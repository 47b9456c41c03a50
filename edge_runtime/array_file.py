"""Files of arrays that lie beside a model, in numpy's .npz format. Nothing in them is trusted.

Such a file may have come from anywhere. Every array has exactly the type and the shape that its reader asks
for, or the file is refused; numpy's own parser, which takes much more than it writes, never sees it.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ModelFileError
from edge_runtime.private_files import write_file

_META = "meta"
_MAX_HEADER_BYTES = 1 << 12  # of an array in numpy's format
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = struct.Struct("<8sH")  # _MAGIC, length of the description that follows


def write_arrays(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a description, as JSON can hold it, and little-endian arrays, as a whole.

    Raises:
        OSError: it cannot be written.
    """
    target = io.BytesIO()
    described = np.frombuffer(json.dumps(dict(meta), sort_keys=True).encode(), np.uint8)
    named: dict[str, Any] = {_META: described, **arrays}
    np.savez_compressed(target, **named)
    write_file(path, target.getvalue(), 0o644)


class ArrayFile:
    """One open file.

    Args:
        remedy: what its reader is told to do about a damaged one.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, remedy: str) -> None:
        self.path = path
        self._archive = archive
        self._remedy = remedy

    def damaged(self, what: str) -> ModelFileError:
        """The error that says what is wrong with the file."""
        return ModelFileError(f"{self.path}: {what}; {self._remedy}")

    def meta(self, kinds: Mapping[str, type], most_bytes: int = 1 << 16) -> dict[str, Any]:
        """The description, with exactly these entries, each of exactly this type.

        Raises:
            ModelFileError: it has others.
        """
        meta = json.loads(bytes(self.array(_META, "|u1", None, most_bytes=most_bytes)))
        if not isinstance(meta, dict) or set(meta) != set(kinds):
            raise self.damaged("its description lacks something, or has too much")
        wrong = [name for name, kind in kinds.items() if type(meta[name]) is not kind]
        if wrong:
            raise self.damaged(f"a value is of the wrong kind ({', '.join(wrong)})")
        return meta

    def array(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...] | None,
        *,
        finite: bool = True,
        most_bytes: int = 1 << 16,
    ) -> NDArray[Any]:
        """One array of exactly this type and shape; `shape` None: one axis, of `most_bytes` at most.

        Raises:
            ModelFileError: it is another, or holds numbers that are not finite.
        """
        try:
            member = self._archive.getinfo(f"{name}.npy")
        except KeyError:
            raise self.damaged(f"it has no {name}") from None
        most = most_bytes if shape is None else math.prod(shape) * np.dtype(dtype).itemsize
        if member.file_size > most + _MAX_HEADER_BYTES:
            raise self.damaged(f"{name} has {member.file_size} bytes, {most} are needed")
        content = self._archive.read(member)
        start = _HEADER.size + _HEADER.unpack_from(content)[1] if len(content) > _HEADER.size else 0
        # Compared, not parsed: numpy's parser takes much more than it writes.
        header = content[_HEADER.size : start].decode("latin-1").strip()
        kind = np.dtype(dtype)
        if shape is None:
            shape = ((len(content) - start) // kind.itemsize,)
        needed = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
        if content[: len(_MAGIC)] != _MAGIC or header != needed:
            raise self.damaged(f"{name} is {header[:80]!r}, needed is {needed}")
        values: NDArray[Any] = np.frombuffer(content, kind, offset=start)
        if finite and kind.kind == "f" and not np.isfinite(values).all():
            raise self.damaged(f"{name} holds numbers that are not finite")
        return values.reshape(shape)


@contextmanager
def opened_arrays(path: Path, remedy: str) -> Iterator[ArrayFile]:
    """Open a file for reading.

    Args:
        remedy: what to do about a damaged one, for the error's message.

    Raises:
        ModelFileError: it cannot be read or is damaged; also for what shows while it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield ArrayFile(path, archive, remedy)
    # RuntimeError: encrypted, or JSON that nests too deeply.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFileError(f"{path}: {str(error)[:200] or type(error).__name__}; {remedy}") from error
    except (ValueError, OverflowError) as error:  # no JSON, or parts that do not fit together
        raise ModelFileError(f"{path}: {str(error)[:200]}; {remedy}") from error
