"""The logit lens, against the loss that it is the gradient of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from editing_parts import generator, opened
from numpy.typing import NDArray

from edge_runtime.engine.dequantize import rows_as_floats
from edge_runtime.engine.engine import Engine
from edge_runtime.personalize.lens import lens_directions
from models.synthetic import SyntheticModel, write_synthetic_gguf

Doubles = NDArray[np.float64]

TOKENS = np.array([5, 17, 40])


@pytest.fixture(scope="module", params=["own head", "tied head"])
def engine(
    request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    path = demo_model
    if request.param == "tied head":
        path = tmp_path_factory.mktemp("tied") / "model.gguf"
        write_synthetic_gguf(path, SyntheticModel(n_layers=1, tied_head=True))
    with opened(path) as engine:
        yield engine


def losses(engine: Engine, hidden: Doubles) -> Doubles:
    """(n,) -log likelihood of TOKENS, by the formula."""
    head = "output.weight" if "output.weight" in engine.gguf.tensors else "token_embd.weight"
    norm = np.frombuffer(engine.gguf.tensor_bytes("output_norm.weight"), np.float32)
    epsilon = engine.hyperparameters.norm_epsilon
    normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + epsilon) * norm
    logits = normed @ rows_as_floats(engine.gguf, head).T.astype(np.float64)
    found: Doubles = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(TOKENS)), TOKENS]
    return found


def test_the_loss_rises_along_the_direction_and_stays_across_it(engine: Engine) -> None:
    width = engine.hyperparameters.n_embd
    hidden = generator(1).standard_normal((len(TOKENS), width))
    found = lens_directions(engine.gguf, engine.hyperparameters, hidden.astype(np.float32), TOKENS)
    assert found.shape == hidden.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)

    def slopes(directions: Doubles) -> Doubles:
        step = 1e-3
        above, below = (losses(engine, hidden + side * step * directions) for side in (1, -1))
        rise: Doubles = (above - below) / (2 * step)
        return rise

    along = slopes(found)
    assert (along > 0).all()
    for seed in range(5):
        across = generator(seed).standard_normal(hidden.shape)
        across -= (across * found).sum(axis=1, keepdims=True) * found
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        assert (np.abs(slopes(across)) < 1e-3 * along).all()


def test_rows_are_the_same_in_parts_and_whole(engine: Engine) -> None:
    name = "token_embd.weight"
    whole = rows_as_floats(engine.gguf, name)
    assert whole.shape == tuple(reversed(engine.gguf.tensors[name].shape))
    np.testing.assert_array_equal(rows_as_floats(engine.gguf, name, 3, 9), whole[3:9])
    assert np.isfinite(whole).all() and whole.any()
