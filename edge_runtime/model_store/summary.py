"""What a model file is, in one record: for lists, for checks, for people."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_LICENCE_KEYS = ("general.license", "general.license.name", "general.license.link")


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A GGUF file at a glance.

    Attributes:
        title: the model's own name, empty where it states none.
        parameters: number of weights.
        quantization: share of the weights by ggml type, largest first; shares sum to 1.
        context: tokens the model was trained for.
        tokenizer: kind of vocabulary, such as ``llama`` (SentencePiece) or ``gpt2`` (BPE).
        chat_template: whether the file holds one.
        licence: as the file states it, empty where it does not.
        size: of the file, in bytes.
    """

    title: str
    architecture: str
    parameters: int
    quantization: dict[str, float] = field(hash=False)
    context: int
    layers: int
    embedding: int
    vocabulary: int
    tokenizer: str
    chat_template: bool
    licence: str
    size: int

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check_model(path: str | os.PathLike[str]) -> None:
    """Check all that can be checked without running a model: its header, its tensors, its vocabulary.

    Raises:
        ModelFileError: the file is damaged, or no GGUF.
        UnsupportedModelError: sound, but nothing the engine runs.
    """
    from edge_runtime.engine.gguf import GGUFFile
    from edge_runtime.engine.tokenizer import Tokenizer

    summarize(path)
    with GGUFFile(path) as gguf:
        Tokenizer(gguf).close()


def summarize(path: str | os.PathLike[str]) -> ModelSummary:
    """Read a model file's header and check that the engine can run it.

    Raises:
        ModelFileError: the file is damaged, or no GGUF.
        UnsupportedModelError: sound, but nothing the engine runs.
    """
    from edge_runtime.engine.architecture import check_tensors, read_hyperparameters
    from edge_runtime.engine.gguf import GGML_TYPES, GGUFFile

    with GGUFFile(path) as gguf:
        hyperparameters = read_hyperparameters(gguf)
        check_tensors(gguf, hyperparameters)
        weights: Counter[str] = Counter()
        for record in gguf.tensors.values():
            weights[GGML_TYPES[record.type].name.upper()] += math.prod(record.shape)
        parameters = sum(weights.values())
        metadata = gguf.metadata
        licences = [str(metadata[key]) for key in _LICENCE_KEYS if metadata.get(key)]
        return ModelSummary(
            title=str(metadata.get("general.name", "")),
            architecture=hyperparameters.architecture,
            parameters=parameters,
            quantization={name: count / parameters for name, count in weights.most_common()},
            context=hyperparameters.n_ctx_train,
            layers=hyperparameters.n_layers,
            embedding=hyperparameters.n_embd,
            vocabulary=hyperparameters.n_vocab,
            tokenizer=str(metadata.get("tokenizer.ggml.model", "")),
            chat_template=bool(metadata.get("tokenizer.chat_template")),
            licence=", ".join(licences[:2]),
            size=Path(path).stat().st_size,
        )
