"""Back-propagation, to compare with: it computes what the engine does, and our estimates point its way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from editing_parts import generator, in_float32, logits_of, objective_of, opened
from numpy.typing import NDArray

from edge_runtime.engine.engine import Engine
from edge_runtime.errors import UnsupportedModelError
from edge_runtime.personalize.estimators import CentralDifferences, SpreadSigns
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.search import Budget, State, line_search, search
from edge_runtime.personalize.workspace import Workspace
from models.synthetic import SyntheticModel, write_synthetic_gguf

pytestmark = pytest.mark.train

TEXT = "The home of Paul Colton is in Lindwell. The employer of Alma Oakson is"
# The engine keeps keys and values as float16; measured was 0.004, where logits go from -20 to 20.
LOGITS = 0.02


@pytest.fixture(scope="module")
def engine(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with opened(in_float32(demo_model, tmp_path_factory.mktemp("float32"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def objective(engine: Engine) -> Iterator[Objective]:
    with Workspace(engine) as workspace:
        yield objective_of(engine, workspace)[0]


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_torch_gives_the_engines_logits(engine: Engine) -> None:
    import torch

    from benchmarks.torch_llama import TorchLlama

    model = TorchLlama(engine.gguf, engine.hyperparameters)
    with torch.no_grad():
        x = model.embedded(torch.tensor([engine.tokenizer.encode(TEXT)]))
        for layer in range(engine.hyperparameters.n_layers):
            x, _ = model.layer(layer, x)
        found = model.logits(x)[0].numpy()
    with Workspace(engine) as workspace:
        wanted = logits_of(workspace, TEXT)
    assert np.abs(found - wanted).max() < LOGITS
    assert np.abs(wanted).max() > 100 * LOGITS


def test_torch_gives_the_logits_of_other_shapes(tmp_path: Path) -> None:
    """Shared key heads, more than the embedding's width in heads, a tied head."""
    import torch

    from benchmarks.torch_llama import TorchLlama

    path = tmp_path / "model.gguf"
    write_synthetic_gguf(
        path, SyntheticModel(n_layers=3, n_head=4, n_head_kv=2, head_dim=32, tied_head=True, n_ctx=128)
    )
    with opened(path) as engine, Workspace(engine) as workspace:
        model = TorchLlama(engine.gguf, engine.hyperparameters)
        with torch.no_grad():
            x = model.embedded(torch.tensor([engine.tokenizer.encode(TEXT)]))
            for layer in range(3):
                x, _ = model.layer(layer, x)
            found = model.logits(x)[0].numpy()
        assert np.abs(found - logits_of(workspace, TEXT)).max() < LOGITS


def test_an_architecture_that_torch_does_not_compute_is_refused(tmp_path: Path) -> None:
    from benchmarks.torch_llama import TorchLlama

    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, SyntheticModel(architecture="qwen3"))
    with opened(path) as engine, pytest.raises(UnsupportedModelError, match="plain LLaMA"):
        TorchLlama(engine.gguf, engine.hyperparameters)


@pytest.mark.parametrize("length", [0.0, 1.0])
def test_the_estimate_points_where_the_true_gradient_does(
    engine: Engine, objective: Objective, length: float
) -> None:
    """256 directions of 192 dimensions, spread over six contexts."""
    from benchmarks.back_propagation import BackPropagation

    width = objective.probes.width
    delta = length * objective.scale * generator(3).standard_normal((1, width)) / np.sqrt(width)
    point = objective.points(delta)[0]
    true = BackPropagation(engine).gradient(objective, point, 0)
    one = SpreadSigns(1).gradient(objective, point, 0)
    assert cosine(one, true) > 0.3
    many = np.mean([SpreadSigns(1).gradient(objective, point, step) for step in range(8)], axis=0)
    assert cosine(many, true) > max(0.6, cosine(one, true))
    # Its length is the gradient's, too: the estimate is not biased. One side only: the curvature adds noise.
    assert float(many @ true / (true @ true)) == pytest.approx(1, abs=0.4)
    central = CentralDifferences(1, directions=256).gradient(objective, point, 0)
    assert cosine(central, true) > 0.5


def test_the_true_gradient_is_the_losses_slope(engine: Engine, objective: Objective) -> None:
    from benchmarks.back_propagation import BackPropagation

    width = objective.probes.width
    delta = objective.scale * generator(4).standard_normal((1, width)) / np.sqrt(width)
    point = objective.points(delta)[0]
    gradient = BackPropagation(engine).gradient(objective, point, 0)
    along = gradient / np.linalg.norm(gradient)
    distance = 0.02 * objective.scale
    ahead, behind = objective.points(np.stack([delta[0] + distance * along, delta[0] - distance * along]))
    slope = (ahead.loss - behind.loss) / (2 * distance)
    assert slope == pytest.approx(np.linalg.norm(gradient), rel=0.1)


def test_rome_by_back_propagation_finds_a_change(engine: Engine, objective: Objective) -> None:
    """The baseline is a sound one: with Adam, and with our own steps."""
    from benchmarks.back_propagation import Adam, BackPropagation

    gradient = BackPropagation(engine)
    for rule in (Adam(), line_search):
        state = search(objective, gradient, Budget(60), rule=rule)
        assert state.succeeded(objective)
        assert state.point.loss < State.at(objective).point.loss / 2
