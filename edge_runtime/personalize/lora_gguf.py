"""Adapters as GGUF LoRA files, as llama.cpp loads them (src/llama-adapter.cpp, convert_lora_to_gguf.py).

A file holds ``MATRIX.lora_a`` (rank, n_in) and ``MATRIX.lora_b`` (n_out, rank), and one alpha for all:
llama.cpp computes W + alpha / rank * B A, and W + B A where alpha is 0 or missing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile, TensorRecord
from edge_runtime.engine.weights import HEAD
from edge_runtime.errors import AdapterFileError, ModelFileError, ModelNotFoundError, RequestError
from edge_runtime.personalize.model_matrices import joined, matrix_shapes, misfit, with_scale_in_b
from edge_runtime.private_files import write_file

ALPHA = "adapter.lora.alpha"
_A, _B = ".lora_a", ".lora_b"
_INVOCATION = "adapter.alora.invocation_tokens"
_MAX_NAME = 1 << 12  # bytes
_ALIGNMENT = 32
_F32, _STRING, _FLOAT = 0, 8, 6  # as GGUF numbers them: a tensor's type, two of values
_DTYPES = {0: "<f4", 1: "<f2", 30: "<u2"}  # tensor types: F32, F16, and BF16, the upper half of a float32
_BF16 = 30


# --- writing ----------------------------------------------------------------------------------


def write_lora_gguf(path: Path, changes: Sequence[LowRank], gguf: GGUFFile, name: str = "") -> None:
    """Write an adapter of a model as F32; what was at `path` is replaced in one step.

    Several changes of one matrix become one. Where ranks differ they are filled with zeros up to powers of
    two, so that each matrix's share of the common alpha is one too. Scales go into alpha if that is exact,
    else into B, each of whose numbers is then rounded once.

    Args:
        gguf: the model.
        name: kept in the file, for people.

    Raises:
        RequestError: a change does not fit the model, or is one that llama.cpp cannot make.
        OSError: the file cannot be written.
    """
    hyperparameters = read_hyperparameters(gguf)
    whole = joined(changes, matrix_shapes(gguf, hyperparameters))
    if hyperparameters.tied_head and any(change.matrix == HEAD for change in whole):
        raise RequestError(
            f"{gguf.path.name} has no {HEAD} of its own, so that llama.cpp cannot change it alone; "
            "export this adapter as PEFT"
        )
    alpha, scaled = _with_one_alpha(whole)
    pairs = [
        _text("general.architecture", hyperparameters.architecture),
        _text("general.type", "adapter"),
        _text("adapter.type", "lora"),
        _string(ALPHA) + struct.pack("<If", _FLOAT, alpha),
    ]
    if name:
        pairs.append(_text("general.name", name[:_MAX_NAME]))
    tensors = []
    for change in scaled:
        tensors += [(change.matrix + _A, change.a), (change.matrix + _B, change.b)]
    write_file(path, _encode(pairs, tensors), 0o600)


def _with_one_alpha(changes: Sequence[LowRank]) -> tuple[float, list[LowRank]]:
    """An alpha, and changes that it is right for; what they do stays the same."""
    ranks = {change.a.shape[0] for change in changes}
    scales = {change.scale for change in changes}
    if len(ranks) == 1 and len(scales) == 1:
        (rank,), (scale,) = ranks, scales
        with np.errstate(over="ignore", under="ignore"):
            alpha = np.float32(scale * rank)
            # 0 would mean 1, and llama.cpp divides in float32.
            exact = alpha != 0 and np.isfinite(alpha) and alpha / np.float32(rank) == np.float32(scale)
        if exact:
            return float(alpha), list(changes)
        return float(rank), [with_scale_in_b(change) for change in changes]
    if len(ranks) == 1:
        return float(max(ranks)), [with_scale_in_b(change) for change in changes]
    padded = {rank: 1 << (rank - 1).bit_length() for rank in ranks}
    alpha = max(padded.values())
    filled = []
    for change in changes:
        rank = change.a.shape[0]
        exact = with_scale_in_b(change, padded[rank] / alpha)
        more = padded[rank] - rank
        filled.append(
            replace(exact, a=np.pad(exact.a, ((0, more), (0, 0))), b=np.pad(exact.b, ((0, 0), (0, more))))
        )
    return float(alpha), filled


def _encode(pairs: Sequence[bytes], tensors: Sequence[tuple[str, NDArray[np.float32]]]) -> bytes:
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)), *pairs]
    body: list[bytes] = []
    offset = 0
    for name, values in tensors:
        raw = np.ascontiguousarray(values, "<f4").tobytes()
        head.append(_string(name) + struct.pack("<IQQIQ", 2, *reversed(values.shape), _F32, offset))
        body += [raw, bytes(-len(raw) % _ALIGNMENT)]
        offset += len(raw) + len(body[-1])
    header = b"".join(head)
    return b"".join([header, bytes(-len(header) % _ALIGNMENT), *body])


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _text(key: str, text: str) -> bytes:
    return _string(key) + struct.pack("<I", _STRING) + _string(text)


# --- reading ----------------------------------------------------------------------------------


def read_lora_gguf(path: Path, gguf: GGUFFile) -> tuple[LowRank, ...]:
    """Read a GGUF LoRA of this model; nothing in it is trusted.

    Args:
        gguf: the model.

    Returns:
        one change a matrix, in the model's order, with the scale alpha / rank.

    Raises:
        AdapterFileError: it cannot be read, is damaged, of another model, or does what this engine cannot.
    """
    hyperparameters = read_hyperparameters(gguf)
    shapes = matrix_shapes(gguf, hyperparameters)
    try:
        with GGUFFile(path) as file:
            alpha = _check_metadata(file, hyperparameters.architecture)
            found = [_read_change(file, matrix, alpha) for matrix in _matrices(file)]
    except (ModelFileError, ModelNotFoundError) as error:  # of the container
        raise AdapterFileError(f"{error}; this is no sound GGUF LoRA") from error
    for change in found:
        if (wrong := misfit(change, shapes)) is not None:
            raise AdapterFileError(f"{path}: {wrong}; is it an adapter of {gguf.path.name}?")
    places = list(shapes)
    return tuple(sorted(found, key=lambda change: places.index(change.matrix)))


def _check_metadata(file: GGUFFile, architecture: str) -> float:
    """The file's alpha, 0 where it has none, after checking that it is a LoRA of such a model."""
    for key, needed in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", architecture),
    ):
        found = file.get_str(key, default="")
        if found != needed:
            raise AdapterFileError(
                f"{file.path}: {key} is {found[:80]!r}, needed is {needed!r}; give a GGUF LoRA of a "
                f"{architecture} model"
            )
    if _INVOCATION in file.metadata:
        raise AdapterFileError(
            f"{file.path} works only behind certain tokens ({_INVOCATION}); this engine has no such adapters"
        )
    return file.get_float(ALPHA, default=0.0)


def _matrices(file: GGUFFile) -> list[str]:
    """The matrices that the file has both parts of."""
    if not file.tensors:
        raise AdapterFileError(f"{file.path} changes nothing; a GGUF LoRA has pairs of *{_A} and *{_B}")
    parts: dict[str, set[str]] = {}
    for name in file.tensors:
        matrix, dot, suffix = name.rpartition(".")
        if dot + suffix not in (_A, _B):
            raise AdapterFileError(
                f"{file.path}: {name[:80]!r} is no part of a low-rank change; "
                f"only *{_A} and *{_B} can be read"
            )
        parts.setdefault(matrix, set()).add(dot + suffix)
    for matrix, found in parts.items():
        if len(found) == 1:
            raise AdapterFileError(
                f"{file.path}: {matrix[:80]!r} has {found.pop()} alone; {_A} and {_B} are needed"
            )
    return list(parts)


def _read_change(file: GGUFFile, matrix: str, alpha: float) -> LowRank:
    a, b = _values(file, file.tensors[matrix + _A]), _values(file, file.tensors[matrix + _B])
    rank = len(a)
    with np.errstate(over="ignore", under="ignore"):
        scale = float(np.float32(alpha) / np.float32(rank)) if alpha else 1.0
    return LowRank(matrix, a, b, scale)


def _values(file: GGUFFile, record: TensorRecord) -> NDArray[np.float32]:
    """A tensor as a float32 matrix, its rows as the file has them."""
    if record.type not in _DTYPES:
        raise AdapterFileError(
            f"{file.path}: {record.name[:80]!r} is quantized; convert the adapter with F32, F16 or BF16"
        )
    if any(extent != 1 for extent in record.shape[2:]):
        raise AdapterFileError(
            f"{file.path}: {record.name[:80]!r} has the shape {record.shape}; a matrix is needed"
        )
    raw = np.frombuffer(file.tensor_bytes(record.name), _DTYPES[record.type])
    if record.type == _BF16:
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    columns, rows = (*record.shape, 1)[:2]
    return raw.astype(np.float32).reshape(rows, columns)
