"""A vector for a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.graph import Capture
from edge_runtime.errors import RequestError


def embed(engine: Engine, tokens: Sequence[int]) -> NDArray[np.float32]:
    """The mean over a text's tokens of the last normalised hidden state, scaled to length 1.

    Args:
        tokens: at least one, at most the context.

    Returns:
        (n_embd,) float32.

    Raises:
        ContextOverflowError: more tokens than the context holds.
        RequestError: no tokens, or all sequences are busy.
    """
    tokens = [int(token) for token in tokens]
    engine.check_prompt(tokens, room=0)
    place = engine.places.claim(tokens)
    if place is None:
        raise RequestError(f"all {len(engine.places)} sequences of this engine are busy; close one first")
    hp, model = engine.hyperparameters, engine.model
    total = np.zeros(hp.n_embd)
    capture = Capture("residual", hp.n_layers)
    try:
        # Every token's state is needed, so what is in the cache already is computed again.
        model.cells.remove(place.number)
        place.tokens.clear()
        for start in range(0, len(tokens), engine.options.batch):
            chunk = tokens[start : start + engine.options.batch]
            positions = np.arange(start, start + len(chunk), dtype=np.int32)
            batch = Batch(chunk, positions, place.number, logits=(), capture=[capture])
            states = model.forward(batch).captured[capture].astype(np.float64)
            place.tokens += chunk
            total += (states / np.sqrt((states**2).mean(axis=1, keepdims=True) + hp.norm_epsilon)).sum(axis=0)
    finally:
        engine.places.release(place)
    weights = np.frombuffer(model.weights.bytes_in_file("output_norm.weight"), np.float32)
    mean = total * weights
    return (mean / (np.linalg.norm(mean) or 1.0)).astype(np.float32)
