"""The logit lens: which change of a hidden state would make a token likelier if the head read it at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.dequantize import rows_as_floats
from edge_runtime.engine.gguf import GGUFFile

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_BLOCK = 1 << 20  # values of the head that are held at once


def lens_directions(
    gguf: GGUFFile, hyperparameters: Hyperparameters, hidden: Floats, tokens: NDArray[np.integer]
) -> Doubles:
    """Directions of length 1 along which each token's likelihood falls fastest, through the lens.

    That is the gradient of ``-log softmax(W_U norm(h))[token]`` as if no layer were left:
    ``W_U' (softmax - onehot)`` taken through the final norm.

    Args:
        hidden: (n, n_embd) residual stream.
        tokens: (n,) one for each row.

    Returns:
        (n, n_embd).
    """
    norm = np.frombuffer(gguf.tensor_bytes("output_norm.weight"), np.float32).astype(np.float64)
    rms = np.sqrt((hidden.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + hyperparameters.norm_epsilon)
    unit = hidden / rms
    normed = (unit * norm).astype(np.float32)
    logits = np.concatenate([normed @ rows.T for rows in _head(gguf)], axis=1)
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(tokens)), tokens] -= 1
    behind, start = np.zeros(hidden.shape), 0
    for rows in _head(gguf):
        behind += error[:, start : start + len(rows)] @ rows
        start += len(rows)
    scaled = behind * norm
    gradient = (scaled - unit * (scaled * unit).mean(axis=1, keepdims=True)) / rms
    found: Doubles = gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-30)
    return found


def _head(gguf: GGUFFile) -> Iterator[Floats]:
    """(n_rows, n_embd) of the output matrix, part after part."""
    name = "output.weight" if "output.weight" in gguf.tensors else "token_embd.weight"
    n_rows = gguf.tensors[name].shape[1]
    step = max(1, _BLOCK // gguf.tensors[name].shape[0])
    for start in range(0, n_rows, step):
        yield rows_as_floats(gguf, name, start, min(start + step, n_rows))
