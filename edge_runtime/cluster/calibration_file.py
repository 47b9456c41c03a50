"""A model's calibration, and the file beside the model that it is kept in.

``MODEL.calibration.npz`` is a zip file of arrays in numpy's format. It may have come from anywhere: every
array has exactly the type and shape that the model asks for, or the file is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.model_store.paths import CALIBRATION_SUFFIX
from edge_runtime.private_files import write_file
from scheduler.patience import Response, Rung

Fill = Literal["zero", "mean"]

_VERSION = 1
_MAX_META_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 12  # of an array in numpy's format
_MAX_RUNGS, _MAX_SHARES = 64, 16
_SAMPLE_BYTES = 4096  # of each tensor, for the model's identity
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = struct.Struct("<8sH")  # _MAGIC, length of the description that follows


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What was measured of a model on a text.

    Attributes:
        group_size: neurons in a group.
        importance: (n_layers, n_groups) mean over tokens of the norm of each group's contribution.
        means: (n_layers, n_groups, n_embd) float16, the mean contribution of each group.
        fill: what better stands for a contribution that is missing: nothing, or its mean.
        response: how the perplexity answers to late and lost contributions; its costs are mean divergences,
            its rungs the larger of divergence and measured increase.
        n_tokens: that were scored.
        perplexity: of the model on the text.
        divergences, increases: (n_rungs, n_shares) mean Kullback-Leibler divergence from the exact
            model, in nats a token, and increase of the logarithm of the perplexity.
    """

    group_size: int
    importance: NDArray[np.float32]
    means: NDArray[np.float16]
    fill: Fill
    response: Response
    n_tokens: int
    perplexity: float
    divergences: NDArray[np.float64]
    increases: NDArray[np.float64]


def calibration_path(model: Path) -> Path:
    """Where a model's calibration is kept."""
    return model.with_name(model.stem + CALIBRATION_SUFFIX)


def model_identity(gguf: GGUFFile) -> str:
    """Hexadecimal SHA-256 of a file's header and of the beginning of each tensor.

    Cheap, and different for two trainings of one architecture; not proof against forgery.
    """
    digest = hashlib.sha256()
    with gguf.path.open("rb") as file:
        left = min((tensor.offset for tensor in gguf.tensors.values()), default=0)
        while left and (content := file.read(min(left, 1 << 20))):
            digest.update(content)
            left -= len(content)
    for name in gguf.tensors:
        digest.update(gguf.tensor_bytes(name)[:_SAMPLE_BYTES])
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------


def save_calibration(calibration: Calibration, gguf: GGUFFile) -> Path:
    """Keep a calibration beside its model; returns where.

    Raises:
        OSError: it cannot be written.
    """
    path = calibration_path(gguf.path)
    response = calibration.response
    meta = {
        "version": _VERSION,
        "model": model_identity(gguf),
        "group_size": calibration.group_size,
        "fill": calibration.fill,
        "n_tokens": calibration.n_tokens,
        "perplexity": calibration.perplexity,
        "n_late": response.late_cost.shape[1],
        "shares": list(response.rungs[0].shares),
        "syncs": [list(rung.syncs) for rung in response.rungs],
    }
    target = io.BytesIO()
    np.savez_compressed(
        target,
        meta=np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8),
        importance=calibration.importance.astype("<f4"),
        means=calibration.means.astype("<f2"),
        late_cost=response.late_cost.astype("<f8"),
        lost_cost=response.lost_cost.astype("<f8"),
        rungs=np.array([rung.increases for rung in response.rungs], "<f8"),
        divergences=calibration.divergences.astype("<f8"),
        increases=calibration.increases.astype("<f8"),
    )
    write_file(path, target.getvalue(), 0o644)
    return path


# --- reading ----------------------------------------------------------------------------------


def find_calibration(gguf: GGUFFile) -> Calibration | None:
    """The calibration beside a model; None where there is none.

    Raises:
        ModelFileError: it is damaged, or of another model.
    """
    path = calibration_path(gguf.path)
    return load_calibration(path, gguf) if path.is_file() else None


def load_calibration(path: Path, gguf: GGUFFile) -> Calibration:
    """Read a calibration of this model; nothing in it is trusted.

    Raises:
        ModelFileError: it cannot be read, is damaged, or of another model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read(gguf)
    # RuntimeError: encrypted, or JSON that nests too deeply.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    except (ValueError, OverflowError) as error:  # no JSON, or parts that do not fit together
        raise _damaged(path, str(error)[:200]) from error


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: {what}; this is no sound calibration, make it anew with `edgert calibrate`"
    )


class _Reader:
    """Reads the arrays of one file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive

    def read(self, gguf: GGUFFile) -> Calibration:
        meta = self._meta()
        if meta["model"] != model_identity(gguf):
            raise ModelFileError(
                f"{self._path} is not of the model {gguf.path}; make it anew with `edgert calibrate`"
            )
        shape = GroupSlices(gguf, read_hyperparameters(gguf), meta["group_size"]).shape
        n_layers, n_groups = shape.n_layers, shape.n_groups
        n_rungs, n_shares, n_late = len(meta["syncs"]), len(meta["shares"]), meta["n_late"]
        shares = tuple(map(float, meta["shares"]))
        measured = {
            name: self._array(name, "<f8", (n_rungs, n_shares))
            for name in ("rungs", "divergences", "increases")
        }
        rungs = tuple(
            Rung(tuple(syncs), shares, tuple(row))
            for syncs, row in zip(meta["syncs"], measured["rungs"].tolist(), strict=True)
        )
        late = self._array("late_cost", "<f8", (n_layers, n_late), finite=False)
        if np.isnan(late).any():
            raise _damaged(self._path, "a cost is no number")
        response = Response(n_layers, late, self._array("lost_cost", "<f8", (n_layers,)), rungs)
        return Calibration(
            group_size=shape.group_size,
            importance=self._array("importance", "<f4", (n_layers, n_groups)),
            means=self._array("means", "<f2", (n_layers, n_groups, shape.n_embd)),
            fill=meta["fill"],
            response=response,
            n_tokens=meta["n_tokens"],
            perplexity=float(meta["perplexity"]),
            divergences=measured["divergences"],
            increases=measured["increases"],
        )

    def _meta(self) -> dict[str, Any]:
        """The file's plain values, each of the right kind and within bounds."""
        meta = json.loads(bytes(self._array("meta", "|u1", None)))
        kinds: dict[str, type] = {
            "version": int,
            "model": str,
            "group_size": int,
            "n_tokens": int,
            "n_late": int,
        }
        kinds |= {"fill": str, "perplexity": float, "shares": list, "syncs": list}
        if not isinstance(meta, dict) or set(meta) != set(kinds):
            raise _damaged(self._path, "its description lacks something, or has too much")
        if meta["version"] != _VERSION:
            raise UnsupportedModelError(
                f"{self._path} has version {str(meta['version'])[:16]}, this program reads {_VERSION}; "
                "make it anew with `edgert calibrate`"
            )
        wrong = [name for name, kind in kinds.items() if type(meta[name]) is not kind]
        bounds = {"group_size": 1 << 20, "n_tokens": 1 << 40, "n_late": 1 << 10}
        wrong += [name for name, most in bounds.items() if name not in wrong and not 0 < meta[name] <= most]
        if wrong or meta["fill"] not in ("zero", "mean") or not math.isfinite(meta["perplexity"]):
            raise _damaged(self._path, f"a value is out of range ({', '.join(wrong) or 'fill, perplexity'})")
        numbers = [*meta["shares"], *(s for syncs in meta["syncs"] if isinstance(syncs, list) for s in syncs)]
        if (
            not 0 < len(meta["shares"]) <= _MAX_SHARES
            or not 0 < len(meta["syncs"]) <= _MAX_RUNGS
            or not all(isinstance(syncs, list) for syncs in meta["syncs"])
            or any(type(number) not in (int, float) for number in meta["shares"])
            or any(type(number) is not int for number in numbers[len(meta["shares"]) :])
        ):
            raise _damaged(self._path, "its sync boundaries or shares are of the wrong kind")
        return meta

    def _array(
        self, name: str, dtype: str, shape: tuple[int, ...] | None, *, finite: bool = True
    ) -> NDArray[Any]:
        """One array of exactly this type and shape; `shape` None: one axis of bounded length."""
        try:
            member = self._archive.getinfo(f"{name}.npy")
        except KeyError:
            raise _damaged(self._path, f"it has no {name}") from None
        most = _MAX_META_BYTES if shape is None else math.prod(shape) * np.dtype(dtype).itemsize
        if member.file_size > most + _MAX_HEADER_BYTES:
            raise _damaged(self._path, f"{name} has {member.file_size} bytes, {most} are needed")
        content = self._archive.read(member)
        start = _HEADER.size + _HEADER.unpack_from(content)[1] if len(content) > _HEADER.size else 0
        # Compared, not parsed: numpy's parser takes much more than it writes.
        header = content[_HEADER.size : start].decode("latin-1").strip()
        kind = np.dtype(dtype)
        if shape is None:
            shape = ((len(content) - start) // kind.itemsize,)
        needed = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
        if content[: len(_MAGIC)] != _MAGIC or header != needed:
            raise _damaged(self._path, f"{name} is {header[:80]!r}, needed is {needed}")
        values: NDArray[Any] = np.frombuffer(content, kind, offset=start)
        if finite and kind.kind == "f" and not np.isfinite(values).all():
            raise _damaged(self._path, f"{name} holds numbers that are not finite")
        return values.reshape(shape)
