"""Contributions that come late or never, against forward passes of the engine itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.cluster.late_evaluation import LOST, LateEvaluation
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.model import Model
from edge_runtime.errors import RequestError
from models.synthetic import SyntheticModel, write_synthetic_gguf

N_LAYERS, N_GROUPS, GROUP = 4, 6, 32
REMOTE = [1, 4]
TOKENS = np.arange(40, dtype=np.int32) * 37 % 250 + 3
POSITIONS = np.arange(40, dtype=np.int32)
# F32 weights and keys: what is left is the order of sums.
TOLERANCE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("late") / "four-layers.gguf"
    shape = SyntheticModel(n_layers=N_LAYERS, n_embd=64, n_ff=N_GROUPS * GROUP, n_vocab=300, n_ctx=128)
    write_synthetic_gguf(path, shape)
    return path


@pytest.fixture(scope="module")
def parts(path: Path) -> Iterator[tuple[LateEvaluation, Model]]:
    """An evaluation, and a model of the same file whose neuron groups are cut."""
    with ExitStack() as resources:
        gguf = resources.enter_context(GGUFFile(path))
        hp = read_hyperparameters(gguf)
        split, whole = (
            resources.enter_context(
                closing(Model(gguf, hp, n_cells=64, n_sequences=4, kv_type="f32", ffn=ffn))
            )
            for ffn in (False, True)
        )
        whole.cut_neuron_groups(GROUP)
        evaluation = LateEvaluation(split, GroupSlices(gguf, hp, GROUP))
        yield resources.enter_context(closing(evaluation)), whole


@pytest.fixture
def evaluation(parts: tuple[LateEvaluation, Model]) -> LateEvaluation:
    evaluation, _ = parts
    evaluation.clear()
    evaluation.split([[REMOTE] * N_LAYERS])
    return evaluation


@pytest.fixture
def whole(parts: tuple[LateEvaluation, Model]) -> Model:
    _, model = parts
    for sequence in range(4):
        model.cells.remove(sequence)
    return model


def outcomes(layer: int, late: int, n_parts: int = 1) -> np.ndarray:
    found = np.zeros((1, N_LAYERS, n_parts), np.int8)
    found[:, layer] = late
    return found


def logits(evaluation: LateEvaluation, *arguments: object, **options: object) -> np.ndarray:
    batch = Batch(TOKENS, POSITIONS)
    return evaluation.logits(evaluation.run(batch, *arguments, **options))  # type: ignore[arg-type]


def contribution(whole: Model, layer: int, groups: list[int]) -> np.ndarray:
    """What these groups add to the stream where all before them is exact, (n_rows, n_embd)."""
    output = Capture("ffn_output", layer)
    run: dict[str, Any] = {"layers": range(layer + 1), "logits": (), "capture": [output]}
    exact = whole.forward(Batch(TOKENS, POSITIONS, **run)).captured[output]
    rest = [group for group in range(N_GROUPS) if group not in groups]
    without = whole.forward(Batch(TOKENS, POSITIONS, groups={layer: rest}, **run))
    return exact - without.captured[output]


def late_logits(whole: Model, layer: int, add: dict[int, np.ndarray]) -> np.ndarray:
    """Logits without the remote groups of a layer, and with something added at boundaries."""
    local = [group for group in range(N_GROUPS) if group not in REMOTE]
    return whole.forward(Batch(TOKENS, POSITIONS, groups={layer: local}, add=add)).logits


@pytest.mark.parametrize("n_fragments", [1, 2])
def test_all_on_time_is_the_dense_model(evaluation: LateEvaluation, whole: Model, n_fragments: int) -> None:
    evaluation.split([[REMOTE] * N_LAYERS, [[0], [], [2, 3], [5]]], n_fragments)
    dense = whole.forward(Batch(TOKENS, POSITIONS)).logits
    on_time = np.zeros((len(TOKENS), N_LAYERS, 2 * n_fragments), np.int8)
    np.testing.assert_allclose(logits(evaluation, on_time), dense, **TOLERANCE)
    np.testing.assert_allclose(logits(evaluation), dense, **TOLERANCE)


@pytest.mark.parametrize(("layer", "late"), [(0, 1), (0, 3), (1, 1), (1, 2), (2, 1)])
def test_late_is_added_before_a_later_layer(
    evaluation: LateEvaluation, whole: Model, layer: int, late: int
) -> None:
    wanted = late_logits(whole, layer, {layer + 1 + late: contribution(whole, layer, REMOTE)})
    np.testing.assert_allclose(logits(evaluation, outcomes(layer, late)), wanted, **TOLERANCE)
    dense = whole.forward(Batch(TOKENS, POSITIONS)).logits
    assert np.abs(wanted - dense).max() > 100 * TOLERANCE["atol"]


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_lost_is_never_added(evaluation: LateEvaluation, whole: Model, layer: int) -> None:
    np.testing.assert_allclose(
        logits(evaluation, outcomes(layer, LOST)), late_logits(whole, layer, {}), **TOLERANCE
    )


def test_what_would_come_after_the_last_layer_is_lost(evaluation: LateEvaluation) -> None:
    np.testing.assert_array_equal(logits(evaluation, outcomes(2, 2)), logits(evaluation, outcomes(2, LOST)))
    np.testing.assert_array_equal(logits(evaluation, outcomes(3, 1)), logits(evaluation, outcomes(3, LOST)))


def test_mean_stands_for_a_contribution_until_it_comes(evaluation: LateEvaluation, whole: Model) -> None:
    layer, late = 1, 1
    means = np.random.default_rng(0).normal(size=(N_LAYERS, N_GROUPS, 64)).astype(np.float16)
    mean = means[layer, REMOTE].astype(np.float32).sum(axis=0)
    came = contribution(whole, layer, REMOTE) - mean
    wanted = late_logits(whole, layer, {layer + 1: mean, layer + 1 + late: came})
    found = logits(evaluation, outcomes(layer, late), means=means)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    lost = late_logits(whole, layer, {layer + 1: mean})
    np.testing.assert_allclose(logits(evaluation, outcomes(layer, LOST), means=means), lost, **TOLERANCE)


def test_a_fragment_holds_part_of_the_vector(evaluation: LateEvaluation, whole: Model) -> None:
    evaluation.split([[REMOTE] * N_LAYERS], 2)
    of_two = outcomes(1, 0, 2)
    of_two[:, 1, 1] = LOST
    came = contribution(whole, 1, REMOTE)
    came[:, 32:] = 0
    np.testing.assert_allclose(logits(evaluation, of_two), late_logits(whole, 1, {2: came}), **TOLERANCE)


def test_workers_have_outcomes_of_their_own(evaluation: LateEvaluation, whole: Model) -> None:
    evaluation.split([[[1]] * N_LAYERS, [[4]] * N_LAYERS], 2)
    found = outcomes(1, 0, 4)
    found[:, 1] = 1, 1, LOST, 0
    on_time = contribution(whole, 1, [4])
    on_time[:, :32] = 0
    wanted = late_logits(whole, 1, {2: on_time, 3: contribution(whole, 1, [1])})
    np.testing.assert_allclose(logits(evaluation, found), wanted, **TOLERANCE)


def test_rows_have_outcomes_of_their_own(evaluation: LateEvaluation, whole: Model) -> None:
    late = np.zeros((len(TOKENS), N_LAYERS, 1), np.int8)
    late[25:, 1] = 1
    came = contribution(whole, 1, REMOTE)
    now, later = came.copy(), came.copy()
    now[25:] = 0
    later[:25] = 0
    wanted = late_logits(whole, 1, {2: now, 3: later})
    found = logits(evaluation, late)
    np.testing.assert_allclose(found, wanted, **TOLERANCE)
    dense = logits(evaluation)
    np.testing.assert_allclose(found[:25], dense[:25], **TOLERANCE)
    assert np.abs(found[25:] - dense[25:]).max() > 100 * TOLERANCE["atol"]


def test_token_by_token_is_the_same_as_all_at_once(evaluation: LateEvaluation) -> None:
    late = np.random.default_rng(1).integers(-1, 3, (len(TOKENS), N_LAYERS, 1)).astype(np.int8)
    at_once = logits(evaluation, late)
    evaluation.clear()
    for place in range(len(TOKENS)):
        batch = Batch(TOKENS[place : place + 1], POSITIONS[place : place + 1])
        found = evaluation.logits(evaluation.run(batch, late[place : place + 1]))
        np.testing.assert_allclose(found[0], at_once[place], **TOLERANCE)


def test_a_run_can_start_at_the_layer_that_differs(evaluation: LateEvaluation) -> None:
    streams: list[np.ndarray] = []
    evaluation.run(Batch(TOKENS, POSITIONS), residuals=streams)
    for layer in (1, 3):
        whole = logits(evaluation, outcomes(layer, LOST))
        part = logits(evaluation, outcomes(layer, LOST), start=layer, residuals=streams)
        np.testing.assert_array_equal(part, whole)


def test_eight_bits_on_the_way_change_little_but_something(evaluation: LateEvaluation) -> None:
    exact = logits(evaluation)
    evaluation.split([[REMOTE] * N_LAYERS], form=ActivationForm.Q8_0)
    np.testing.assert_array_equal(logits(evaluation), exact)
    difference = np.abs(logits(evaluation, outcomes(0, 0)) - exact).max()
    assert 1e-5 < difference < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    "shape", [(1, N_LAYERS, 2), (1, N_LAYERS - 1, 1), (39, N_LAYERS, 1), (N_LAYERS, 1), (0, N_LAYERS, 1)]
)
def test_outcomes_of_another_shape_are_refused(evaluation: LateEvaluation, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="outcomes"):
        evaluation.run(Batch(TOKENS, POSITIONS), np.zeros(shape, np.int8))


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([[[0]] * (N_LAYERS - 1)], "groups of each of 4 layers"),
        ([[[0]] * N_LAYERS, [[0]] * N_LAYERS], "given away twice"),
        ([[[0, 0]] * N_LAYERS], "given away twice"),
        ([[[N_GROUPS]] * N_LAYERS], "has the neuron groups 0 to 5"),
        ([[[-1]] * N_LAYERS], "has the neuron groups 0 to 5"),
    ],
)
def test_groups_that_cannot_be_given_away_are_refused(
    evaluation: LateEvaluation, workers: list[list[list[int]]], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        evaluation.split(workers)


def test_what_cannot_be_run_is_refused(parts: tuple[LateEvaluation, Model]) -> None:
    evaluation, _ = parts
    with pytest.raises(RequestError, match="fragments"):
        evaluation.split([], 0)
    fresh = LateEvaluation(evaluation.model, evaluation.slices)
    with closing(fresh), pytest.raises(RequestError, match="must be split"):
        fresh.run(Batch(TOKENS, POSITIONS))


def test_start_without_streams_is_refused(evaluation: LateEvaluation) -> None:
    with pytest.raises(RequestError, match="start at layer 2"):
        evaluation.run(Batch(TOKENS, POSITIONS), start=2)
