"""The matrices of a model that low-rank changes can be made to, and whether changes fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.weights import EMBEDDING, HEAD
from edge_runtime.errors import RequestError

# In the order in which a layer uses them.
_LAYER_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def matrix_shapes(gguf: GGUFFile, hyperparameters: Hyperparameters) -> dict[str, tuple[int, int]]:
    """Matrix -> (n_in, n_out) of each that a model's side paths can change, in the model's order.

    The head of a model that has none of its own is there as ``output.weight`` all the same.
    """
    names = [
        f"blk.{layer}.{kind}.weight" for layer in range(hyperparameters.n_layers) for kind in _LAYER_MATRICES
    ]
    shapes = {name: gguf.tensors[name].shape for name in names}
    shapes[HEAD] = gguf.tensors[EMBEDDING if hyperparameters.tied_head else HEAD].shape
    return {name: (n_in, n_out) for name, (n_in, n_out) in shapes.items()}


def misfit(change: LowRank, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """What is wrong with a change of a model with these matrices; None where it fits."""
    if change.matrix not in shapes:
        return f"the model has no matrix {change.matrix[:80]!r} that can be changed"
    n_in, n_out = shapes[change.matrix]
    a, b = np.shape(change.a), np.shape(change.b)
    if len(a) != 2 or len(b) != 2 or a[0] < 1 or a[1] != n_in or b != (n_out, a[0]):
        return f"A {a} and B {b} do not fit {change.matrix}; needed are (rank, {n_in}) and ({n_out}, rank)"
    if not (np.isfinite(change.a).all() and np.isfinite(change.b).all() and np.isfinite(change.scale)):
        return f"the change of {change.matrix} has numbers that are not finite"
    return None


def joined(changes: Sequence[LowRank], shapes: Mapping[str, tuple[int, int]]) -> list[LowRank]:
    """The same changes with one for each matrix, in the model's order.

    Several of one matrix become one of their common rank, whose scale is 1.

    Raises:
        RequestError: there are none, or one does not fit the model.
    """
    if not changes:
        raise RequestError("an adapter needs at least one low-rank change of a matrix")
    by_matrix: dict[str, list[LowRank]] = {name: [] for name in shapes}
    for change in changes:
        if (wrong := misfit(change, shapes)) is not None:
            raise RequestError(wrong)
        by_matrix[change.matrix].append(change)
    return [parts[0] if len(parts) == 1 else _as_one(parts) for parts in by_matrix.values() if parts]


def _as_one(parts: Sequence[LowRank]) -> LowRank:
    a = np.concatenate([part.a for part in parts])
    b = np.concatenate([with_scale_in_b(part).b for part in parts], axis=1)
    return LowRank(parts[0].matrix, a, b)


def with_scale_in_b(change: LowRank, factor: float = 1.0) -> LowRank:
    """The same change with the scale 1, and B multiplied by `factor` beside.

    Exact where scale times factor is a power of two; otherwise each number of B is rounded once.

    Raises:
        RequestError: B would leave the range of float32.
    """
    with np.errstate(over="ignore"):
        b = (np.asarray(change.b, np.float64) * (change.scale * factor)).astype(np.float32)
    if not np.isfinite(b).all():
        raise RequestError(
            f"B of {change.matrix} times its scale {change.scale:g} leaves the range of float32"
        )
    return LowRank(change.matrix, np.asarray(change.a, np.float32), b)
