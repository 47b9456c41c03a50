"""What edits of a model need to know of it, found once by forward passes and kept beside its file.

``MODEL.edits.npz`` holds the layer that edits are made in, keys of ordinary text at that layer, and the
sentences that the model itself uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.array_file import opened_arrays, write_arrays
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import ModelFileError, RequestError, UnsupportedModelError
from edge_runtime.model_store.identity import model_identity
from edge_runtime.model_store.paths import EDITS_SUFFIX
from edge_runtime.personalize.templates import SLOT, Template

_VERSION = 1
_REMEDY = "these are no sound statistics for edits, make them anew with `edgert edits prepare`"
_MAX_META_BYTES = 1 << 24
_MAX_SAMPLES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class EditStatistics:
    """Of one model.

    Attributes:
        layer: whose ``ffn_down`` edits change; never the last, which no later token reads.
        layer_losses: layer -> what trial edits came down to in it; of the layers that were tried.
        keys: (n_samples, n_ff) float16, inputs of ``ffn_down`` at tokens of ordinary text.
        templates: sentences that the model uses, those seen most often first.
        usual: how surprising each is with the names it was written about, in nats.
        sentences: a few that the model wrote, to stand before a prompt.
    """

    layer: int
    layer_losses: dict[int, float]
    keys: NDArray[np.float16]
    templates: tuple[Template, ...]
    usual: tuple[float, ...]
    sentences: tuple[str, ...]


def statistics_path(model: Path) -> Path:
    """Where a model's statistics for edits are kept."""
    return model.with_name(model.stem + EDITS_SUFFIX)


def save_statistics(statistics: EditStatistics, gguf: GGUFFile) -> Path:
    """Keep statistics beside their model; returns where.

    Raises:
        OSError: they cannot be written.
    """
    path = statistics_path(gguf.path)
    meta = {
        "version": _VERSION,
        "model": model_identity(gguf),
        "layer": statistics.layer,
        "layer_losses": [[layer, loss] for layer, loss in statistics.layer_losses.items()],
        "n_samples": len(statistics.keys),
        "templates": [[t.text, [list(s) for s in t.sightings]] for t in statistics.templates],
        "usual": list(statistics.usual),
        "sentences": list(statistics.sentences),
    }
    write_arrays(path, meta, {"keys": statistics.keys.astype("<f2")})
    return path


def load_statistics(gguf: GGUFFile) -> EditStatistics:
    """The statistics beside a model; nothing in the file is trusted.

    Raises:
        RequestError: there are none. ModelFileError: they are damaged, or of another model.
    """
    path = statistics_path(gguf.path)
    if not path.is_file():
        raise RequestError(
            f"there are no statistics of {gguf.path.name} yet that edits need; run `edgert edits prepare` "
            "for it once (forward passes only, some minutes)"
        )
    hyperparameters = read_hyperparameters(gguf)
    with opened_arrays(path, _REMEDY) as file:
        kinds = {"version": int, "model": str, "layer": int, "layer_losses": list, "n_samples": int}
        kinds |= {"templates": list, "usual": list, "sentences": list}
        meta = file.meta(kinds, _MAX_META_BYTES)
        if meta["version"] != _VERSION:
            raise UnsupportedModelError(
                f"{path} has version {str(meta['version'])[:16]}, this program reads {_VERSION}; "
                "make it anew with `edgert edits prepare`"
            )
        if meta["model"] != model_identity(gguf):
            raise ModelFileError(f"{path} is not of the model {gguf.path}; {_REMEDY}")
        layer, n_samples = meta["layer"], meta["n_samples"]
        if not 0 <= layer < hyperparameters.n_layers - 1 or not 0 < n_samples <= _MAX_SAMPLES:
            raise file.damaged(f"layer {layer} or {n_samples} samples are out of range")
        try:
            templates = tuple(
                Template(str(text), tuple((str(name), str(answer)) for name, answer in sightings))
                for text, sightings in meta["templates"]
            )
            usual = tuple(float(value) for value in meta["usual"])
            losses = {int(number): float(loss) for number, loss in meta["layer_losses"]}
        except (TypeError, ValueError) as error:
            raise file.damaged(str(error)[:200]) from error
        if len(usual) != len(templates):
            raise file.damaged(f"{len(templates)} sentences, {len(usual)} values of them")
        if not np.isfinite(usual).all():
            raise file.damaged("it holds numbers that are not finite")
        if not all(SLOT in template.text for template in templates):
            raise file.damaged("a sentence has no place for a name")
        keys = file.array("keys", "<f2", (n_samples, hyperparameters.n_ff))
        if not keys.any():
            raise file.damaged("the keys are all zero")
        sentences = tuple(str(text) for text in meta["sentences"])
        return EditStatistics(layer, losses, keys, templates, usual, sentences)
