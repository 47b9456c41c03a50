"""A model's calibration, and the file beside the model that it is kept in.

``MODEL.calibration.npz`` holds arrays; nothing in it is trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.array_file import ArrayFile, opened_arrays, write_arrays
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.model_store.identity import model_identity
from edge_runtime.model_store.paths import CALIBRATION_SUFFIX
from scheduler.patience import Response, Rung

Fill = Literal["zero", "mean"]

_VERSION = 1
_MAX_RUNGS, _MAX_SHARES = 64, 16
_REMEDY = "this is no sound calibration, make it anew with `edgert calibrate`"


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
    arrays = {
        "importance": calibration.importance.astype("<f4"),
        "means": calibration.means.astype("<f2"),
        "late_cost": response.late_cost.astype("<f8"),
        "lost_cost": response.lost_cost.astype("<f8"),
        "rungs": np.array([rung.increases for rung in response.rungs], "<f8"),
        "divergences": calibration.divergences.astype("<f8"),
        "increases": calibration.increases.astype("<f8"),
    }
    write_arrays(path, meta, arrays)
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
    with opened_arrays(path, _REMEDY) as file:
        return _read(file, gguf)


def _read(file: ArrayFile, gguf: GGUFFile) -> Calibration:
    meta = _meta(file)
    if meta["model"] != model_identity(gguf):
        raise ModelFileError(
            f"{file.path} is not of the model {gguf.path}; make it anew with `edgert calibrate`"
        )
    shape = GroupSlices(gguf, read_hyperparameters(gguf), meta["group_size"]).shape
    n_layers, n_groups = shape.n_layers, shape.n_groups
    n_rungs, n_shares, n_late = len(meta["syncs"]), len(meta["shares"]), meta["n_late"]
    shares = tuple(map(float, meta["shares"]))
    measured = {
        name: file.array(name, "<f8", (n_rungs, n_shares)) for name in ("rungs", "divergences", "increases")
    }
    rungs = tuple(
        Rung(tuple(syncs), shares, tuple(row))
        for syncs, row in zip(meta["syncs"], measured["rungs"].tolist(), strict=True)
    )
    late = file.array("late_cost", "<f8", (n_layers, n_late), finite=False)
    if np.isnan(late).any():
        raise file.damaged("a cost is no number")
    response = Response(n_layers, late, file.array("lost_cost", "<f8", (n_layers,)), rungs)
    return Calibration(
        group_size=shape.group_size,
        importance=file.array("importance", "<f4", (n_layers, n_groups)),
        means=file.array("means", "<f2", (n_layers, n_groups, shape.n_embd)),
        fill=meta["fill"],
        response=response,
        n_tokens=meta["n_tokens"],
        perplexity=float(meta["perplexity"]),
        divergences=measured["divergences"],
        increases=measured["increases"],
    )


def _meta(file: ArrayFile) -> dict[str, Any]:
    """The file's plain values, each of the right kind and within bounds."""
    kinds: dict[str, type] = {"version": int, "model": str, "group_size": int, "n_tokens": int, "n_late": int}
    kinds |= {"fill": str, "perplexity": float, "shares": list, "syncs": list}
    meta = file.meta(kinds)
    if meta["version"] != _VERSION:
        raise UnsupportedModelError(
            f"{file.path} has version {str(meta['version'])[:16]}, this program reads {_VERSION}; "
            "make it anew with `edgert calibrate`"
        )
    bounds = {"group_size": 1 << 20, "n_tokens": 1 << 40, "n_late": 1 << 10}
    wrong = [name for name, most in bounds.items() if not 0 < meta[name] <= most]
    if wrong or meta["fill"] not in ("zero", "mean") or not math.isfinite(meta["perplexity"]):
        raise file.damaged(f"a value is out of range ({', '.join(wrong) or 'fill, perplexity'})")
    numbers = [*meta["shares"], *(s for syncs in meta["syncs"] if isinstance(syncs, list) for s in syncs)]
    if (
        not 0 < len(meta["shares"]) <= _MAX_SHARES
        or not 0 < len(meta["syncs"]) <= _MAX_RUNGS
        or not all(isinstance(syncs, list) for syncs in meta["syncs"])
        or any(type(number) not in (int, float) for number in meta["shares"])
        or any(type(number) is not int for number in numbers[len(meta["shares"]) :])
    ):
        raise file.damaged("its sync boundaries or shares are of the wrong kind")
    return meta
