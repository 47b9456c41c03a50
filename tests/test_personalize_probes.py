"""Probes of an edit on the real model: what they say is what a real pass with the same adapter says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from editing_parts import FEW, generator, in_float32, objective_of, opened, rank_one
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine
from edge_runtime.errors import ContextOverflowError
from edge_runtime.personalize.contexts import Context
from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.workspace import Workspace

# With float32 weights. The same rows stand in other batches, and keys and values are kept as float16:
# measured were differences up to 0.003.
NATS = 0.006

Ready = tuple[Engine, Workspace, Objective, NDArray[np.float32]]


@pytest.fixture(scope="module")
def ready(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    with (
        opened(in_float32(demo_model, tmp_path_factory.mktemp("float32"))) as engine,
        Workspace(engine) as workspace,
    ):
        objective, readout = objective_of(engine, workspace)
        yield engine, workspace, objective, readout


def some_deltas(objective: Objective, count: int) -> NDArray[np.float32]:
    """Random changes, some times as long as a hidden state."""
    width = objective.probes.width
    deltas = generator(7).standard_normal((count, width)) / np.sqrt(width)
    return (2 * objective.scale * deltas).astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def predicting(
    workspace: Workspace, context: Context, add: dict[int, NDArray[np.float32]] | None = None
) -> NDArray[np.float64]:
    """(n_target, n_vocab) log-probabilities of a whole pass over a context."""
    workspace.clear()
    tokens = context.tokens[:-1]
    positions = np.arange(len(tokens), dtype=np.int32)
    return log_softmax(
        workspace.forward(Batch(tokens, positions, add=add or {})).logits[context.n_prompt - 1 :]
    )


def measured(
    before: NDArray[np.float64], after: NDArray[np.float64], targets: tuple[int, ...]
) -> tuple[float, float, float]:
    """Negative log-likelihood, divergence and margin, by their definitions."""
    rows = np.arange(len(targets))
    own = after[rows, targets]
    divergence = (np.exp(before) * (before - after)).sum(axis=-1).mean()
    rest = after.copy()
    rest[rows, targets] = -np.inf
    return -own.mean(), divergence, (own - rest.max(axis=-1)).min()


def test_a_probe_is_a_whole_pass_with_the_change_added(ready: Ready) -> None:
    engine, _, objective, _ = ready
    probes, deltas = objective.probes, some_deltas(objective, 3)
    found = probes.everywhere(deltas)
    moved = []
    with Workspace(engine) as other:
        for number, context in enumerate(probes.contexts):
            before = predicting(other, context)
            for row, delta in enumerate(deltas):
                added = np.zeros((len(context.tokens) - 1, probes.width), np.float32)
                added[context.subject_end :] = np.outer(probes.readouts[number], delta)
                after = predicting(other, context, {probes.layer + 1: added})
                nll, divergence, margin = measured(before, after, context.targets)
                assert found.nll[row, number] == pytest.approx(nll, abs=NATS)
                kept = divergence if context.goal == "keep" else 0.0
                assert found.divergence[row, number] == pytest.approx(kept, abs=NATS)
                assert found.margin[row, number] == pytest.approx(margin, abs=2 * NATS)
                moved.append(divergence)
    assert max(moved) > 40 * NATS  # the changes change much


def test_a_probe_foretells_what_the_adapter_does(ready: Ready) -> None:
    """All but what reaches the tokens before the subject, whose readout is about nothing."""
    engine, _, objective, readout = ready
    deltas = some_deltas(objective, 3)
    found = objective.probes.everywhere(deltas)
    statistics = load_statistics(engine.gguf)
    moved, missed = [], []
    with Workspace(engine) as other:
        for number, context in enumerate(objective.probes.contexts):
            other.apply({})
            before = predicting(other, context)
            for row, delta in enumerate(deltas):
                other.apply({"probe": [rank_one(readout, delta, statistics)]})
                nll, divergence, _ = measured(before, predicting(other, context), context.targets)
                missed.append(abs(found.nll[row, number] - nll))
                if context.goal == "keep":
                    missed.append(abs(found.divergence[row, number] - divergence))
                moved.append(divergence)
    assert max(missed) < max(moved) / 4  # measured: a fifteenth


def test_no_change_leaves_the_unedited_model(ready: Ready) -> None:
    _, _, objective, _ = ready
    found = objective.probes.everywhere(np.zeros((1, objective.probes.width), np.float32))
    assert np.abs(found.divergence).max() < NATS / 10
    keeps = ~objective.says
    assert keeps.any()
    assert (found.margin[0, keeps] > 0).all()  # it is what the model says by itself


def test_losses_of_chosen_contexts_are_those_of_all(ready: Ready) -> None:
    _, _, objective, _ = ready
    deltas = some_deltas(objective, 4)
    contexts = np.array([3, 0, 3, 1])
    every, some = objective.probes.everywhere(deltas), objective.probes.losses(deltas, contexts)
    np.testing.assert_allclose(some.nll, every.nll[np.arange(4), contexts], atol=NATS)
    np.testing.assert_allclose(some.divergence, every.divergence[np.arange(4), contexts], atol=NATS)


def test_many_probes_go_through_in_parts_and_leave_no_cells(ready: Ready) -> None:
    """More rows than a pass takes, and fewer sequences than probes."""
    engine, _, objective, readout = ready
    deltas = some_deltas(objective, 12)
    with Workspace(engine, rows=40) as narrow:
        probes = Probes(narrow, objective.probes.layer, objective.probes.contexts)
        free = narrow.model.cells.n_free
        probes.read_out(readout)
        found = probes.everywhere(deltas)
        assert narrow.model.cells.n_free == free
    np.testing.assert_allclose(found.nll, objective.probes.everywhere(deltas).nll, atol=NATS)


def test_probes_share_what_room_there_is(ready: Ready) -> None:
    engine, _, objective, readout = ready
    contexts = objective.probes.contexts
    needed = sum(len(context.tokens) for context in contexts)
    deltas = some_deltas(objective, 6)
    with Workspace(engine, n_cells=needed) as small:
        probes = Probes(small, objective.probes.layer, contexts)
        probes.read_out(readout)
        found = probes.everywhere(deltas)
    np.testing.assert_allclose(found.nll, objective.probes.everywhere(deltas).nll, atol=NATS)
    with (
        Workspace(engine, n_cells=contexts[0].subject_end + 1) as tiny,
        pytest.raises(ContextOverflowError, match=r"too many to be held at once .*give the sentence"),
    ):
        Probes(tiny, objective.probes.layer, contexts)


def test_probes_cost_their_upper_layers_rows_from_the_subject_on(ready: Ready) -> None:
    _, workspace, objective, _ = ready
    probes, n_layers = objective.probes, workspace.hyperparameters.n_layers
    before = workspace.rows_computed
    probes.everywhere(some_deltas(objective, 5))
    rows = sum(len(context.tokens) - 1 - context.subject_end for context in probes.contexts)
    assert workspace.rows_computed - before == pytest.approx(
        5 * rows * (n_layers - 1 - probes.layer) / n_layers
    )


def test_the_readout_is_about_one_at_the_subject_and_small_elsewhere(ready: Ready) -> None:
    _, _, objective, readout = ready
    for context, found in zip(objective.probes.contexts, objective.probes.readouts, strict=True):
        assert len(found) == len(context.tokens) - 1 - context.subject_end
        if context.goal == "say":
            assert found[0] == pytest.approx(1, abs=0.3)
        assert np.abs(found[1:]).max(initial=0) < 0.3
    np.testing.assert_allclose(
        objective.probes.keys @ readout, [rows[0] for rows in objective.probes.readouts], rtol=1e-4
    )


def test_an_objective_weighs_what_is_said_and_what_is_kept(ready: Ready) -> None:
    _, _, objective, _ = ready
    deltas = some_deltas(objective, 2).astype(np.float64)
    losses = objective.probes.everywhere(deltas.astype(np.float32))
    for row, point in enumerate(objective.points(deltas)):
        said = losses.nll[row, objective.says].mean()
        kept = losses.divergence[row, ~objective.says].mean()
        length = np.linalg.norm(deltas[row]) / objective.scale
        assert point.loss == pytest.approx(said + 2.0 * kept + length**2, abs=3 * NATS)
    assert objective.start.loss == pytest.approx(objective.start.values[objective.says].mean(), abs=NATS)
    assert len(objective.probes.contexts) > FEW.keep
