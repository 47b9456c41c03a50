"""Models, low-rank changes of all their matrices, and the logits that the engine gives with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.kv_tensors import KVType
from edge_runtime.engine.model import Model
from edge_runtime.personalize.model_matrices import matrix_shapes
from models.synthetic import SyntheticModel, write_synthetic_gguf

TOKENS = [1, 17, 42, 99, 200, 31, 8, 250, 55, 66, 77, 88]
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def write_model(folder: Path, architecture: str, *, tied_head: bool = False) -> Path:
    """A small model of random weights F32."""
    path = folder / f"{architecture}.gguf"
    write_synthetic_gguf(
        path,
        SyntheticModel(
            architecture=architecture,
            n_layers=2,
            n_embd=64,
            n_ff=96,
            n_head=4,
            n_head_kv=2,
            head_dim=32 if architecture == "qwen3" else None,
            biases=architecture == "qwen2",
            tied_head=tied_head,
            pre_tokenizer=None if architecture == "llama" else "qwen2",
        ),
    )
    return path


def shapes_of(path: Path, *, head: bool = True) -> dict[str, tuple[int, int]]:
    """Matrix -> (n_in, n_out) of what can be changed in a model."""
    with GGUFFile(path) as gguf:
        shapes = matrix_shapes(gguf, read_hyperparameters(gguf))
    return {name: shape for name, shape in shapes.items() if head or name != "output.weight"}


def random_changes(
    shapes: dict[str, tuple[int, int]],
    *,
    ranks: Sequence[int] = (1, 3, 8),
    scales: Sequence[float] = (0.7, 2.0, -1.0, 1.0),
    gain: float = 0.1,
) -> list[LowRank]:
    """One change a matrix; ranks and scales come in turn."""
    generator = np.random.default_rng(0)
    changes = []
    for number, (matrix, (n_in, n_out)) in enumerate(shapes.items()):
        rank = ranks[number % len(ranks)]
        a = generator.standard_normal((rank, n_in), np.float32) / np.float32(np.sqrt(n_in))
        b = generator.standard_normal((n_out, rank), np.float32) * np.float32(gain)
        changes.append(LowRank(matrix, a, b, scales[number % len(scales)]))
    return changes


def product(change: LowRank) -> NDArray[np.float64]:
    """(n_out, n_in): what is added to the matrix."""
    return change.scale * np.asarray(change.b, np.float64) @ np.asarray(change.a, np.float64)


def logits_with(path: Path, changes: Sequence[LowRank], kv_type: KVType = "f16") -> NDArray[np.float32]:
    """(n_tokens, n_vocab) of TOKENS by the engine."""
    with GGUFFile(path) as gguf:
        hyperparameters = read_hyperparameters(gguf)
        model = Model(gguf, hyperparameters, n_cells=256, n_sequences=1, threads=1, kv_type=kv_type)
        try:
            if changes:
                model.set_adapters({"it": changes})
            positions = list(range(len(TOKENS)))
            chosen = {"it": 1.0} if changes else {}
            return model.forward(Batch(TOKENS, positions, 0, positions, adapters=chosen)).logits
        finally:
            model.close()
