"""Recordings of a network, replayed on the demo model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replay import Recording, band, demo_evaluation, imagined, mapped, replay
from benchmarks.replay_facts import LateContinuations, recall
from edge_runtime.cluster.late_evaluation import LOST
from edge_runtime.engine.activations import ActivationForm
from models.demo.engine_continuations import LONGEST, N_SEQUENCES, EngineContinuations
from models.demo.evaluate import recall_prompts
from models.demo.facts import load_facts
from models.demo.paths import MODEL_PATH


@given(st.integers(1, 100), st.integers(1, 100))
def test_bands_cover_every_recorded_layer_in_order(n_layers: int, recorded: int) -> None:
    bands = [band(layer, n_layers, recorded) for layer in range(n_layers)]
    assert all(len(of) >= 1 for of in bands)
    covered = [depth for of in bands for depth in of]
    assert covered == sorted(covered)
    assert set(covered) <= set(range(recorded))
    if recorded >= n_layers:
        assert covered == list(range(recorded))
    for layer, of in enumerate(bands):
        for depth in of:
            apart = abs((depth + 0.5) / recorded - (layer + 0.5) / n_layers)
            assert apart <= 0.5 / recorded + 0.5 / n_layers + 1e-9


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1 << 30))
def test_each_group_has_the_outcome_of_whoever_had_its_like(
    n_layers: int, recorded: int, n_workers: int, n_fragments: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    outcomes = rng.integers(-1, recorded, (5, recorded, n_workers * n_fragments)).astype(np.int8)
    shares = rng.dirichlet(np.ones(n_workers + 1), recorded).T[:n_workers]
    importance = rng.random((n_layers, 7))
    found = mapped(Recording(outcomes, shares), importance)
    for layer in range(n_layers):
        of_group = {
            group: found.outcomes[:, layer, number * n_fragments : (number + 1) * n_fragments]
            for number, worker in enumerate(found.workers)
            for group in worker[layer]
        }
        depths = band(layer, n_layers, recorded)
        for token in range(5):
            depth = depths[token % len(depths)]
            away = np.ceil(np.cumsum(shares[:, depth]) * 7 - 1e-9)
            for rank, group in enumerate(importance[layer].argsort(kind="stable").tolist()):
                wanted = [0] * n_fragments  # here
                if rank < away[-1]:
                    first = int(np.argmax(rank < away)) * n_fragments
                    wanted = outcomes[token, depth, first : first + n_fragments].tolist()
                there = of_group[group][token].tolist() if group in of_group else [0] * n_fragments
                assert there == [min(late, n_layers - 1 - layer) for late in wanted]


def test_a_recording_of_the_same_depth_is_taken_as_it_is() -> None:
    outcomes = np.zeros((2, 3, 2), np.int8)
    outcomes[0, 0] = 1, 2
    outcomes[1, 2, 1] = LOST
    importance = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [2, 1, 4, 3]])
    found = mapped(Recording(outcomes, np.array([[0.5, 0.25, 0.0], [0.25, 0.5, 1.0]])), importance)
    assert found.workers == [[[3, 2], [0], [1, 0, 3, 2]], [[1], [1, 2], []]]
    assert found.outcomes.tolist() == [[[1, 2], [0, 0], [0, 0]], [[0, 0], [0, 0], [LOST, 0]]]


def test_lost_stays_lost_and_late_comes_at_the_last_boundary_at_the_latest() -> None:
    outcomes = np.zeros((1, 8, 1), np.int8)
    outcomes[0, :, 0] = 7, LOST, 5, LOST, 3, LOST, 1, LOST
    found = mapped(Recording(outcomes, np.ones((1, 8))), np.ones((2, 4)))
    assert found.outcomes[0, :, 0].tolist() == [1, 0]
    assert mapped(Recording(outcomes[:, 1:], np.ones((1, 7))), np.ones((1, 4))).outcomes[0, 0, 0] == LOST


def test_a_recording_survives_its_file(tmp_path: Path) -> None:
    made = imagined((2, 4), 4, share=0.5, loss=0.2, n_tokens=50, local=[0])
    made.save(tmp_path / "recording.npz")
    kept = Recording.load(tmp_path / "recording.npz")
    np.testing.assert_array_equal(kept.outcomes, made.outcomes)
    np.testing.assert_array_equal(kept.shares, made.shares)
    assert kept.n_fragments == 2
    counts = made.counts()
    assert counts["lost"] == pytest.approx(0.2, abs=0.1)
    assert sum(counts.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("outcomes", "shares"),
    [
        (np.zeros((1, 2, 3), np.int8), np.zeros((2, 2))),
        (np.zeros((0, 2, 2), np.int8), np.zeros((2, 2))),
        (np.zeros((1, 3, 2), np.int8), np.zeros((2, 2))),
        (np.zeros((1, 2, 2), np.int16), np.zeros((2, 2))),
        (np.full((1, 2, 2), -2, np.int8), np.zeros((2, 2))),
        (np.zeros((1, 2, 2), np.int8), np.full((2, 2), 0.6)),
    ],
)
def test_a_recording_that_contradicts_itself_is_refused(outcomes: np.ndarray, shares: np.ndarray) -> None:
    with pytest.raises(ValueError, match="shares"):
        Recording(outcomes, shares)


def test_a_perfect_network_changes_nothing() -> None:
    found = replay(imagined(range(1, 7), 6, share=0.5, loss=0.0, n_tokens=8), ActivationForm.F32, 1000)
    for name in ("as recorded", "folded in, mean", "not folded in, zero"):
        assert found[name]["perplexity"] == pytest.approx(1, abs=1e-6)
    assert found["outcomes"] == {"on time": 1.0}
    assert 1.5 < found["exact"] < 2


def test_eight_bits_on_the_way_are_held_against_the_exact_model() -> None:
    found = replay(imagined(range(1, 7), 6, share=1.0, loss=0.0, n_tokens=8), ActivationForm.Q8_0, 1000)
    assert 1e-7 < found["as recorded"]["divergence"] < 1e-3


def test_folding_in_what_is_late_is_better_than_not() -> None:
    found = replay(imagined((1, 3, 6), 6, share=0.75, loss=0.01), max_tokens=1500)
    late, dropped = found["folded in, zero"]["divergence"], found["not folded in, zero"]["divergence"]
    assert 1e-4 < late < 0.8 * dropped


def test_facts_are_recalled_as_by_the_engine_while_nothing_is_late() -> None:
    """And fewer of them where whole layers never come."""
    prompts = [prompt.text for prompt in recall_prompts(load_facts(), 1, "person")[:400:10]]
    with EngineContinuations(MODEL_PATH) as engine:
        wanted = engine(prompts, 3)
    with demo_evaluation(LONGEST, N_SEQUENCES) as (loaded, evaluation, calibration):
        there = mapped(imagined(range(1, 7), 6, share=1.0, loss=1.0, n_tokens=8), calibration.importance)
        evaluation.split(there.workers, there.n_fragments)
        exact = LateContinuations(evaluation, loaded.tokenizer, None, None, prompts_too=True)
        assert exact(prompts, 3) == wanted
        lost = LateContinuations(evaluation, loaded.tokenizer, there, None, prompts_too=True)
        assert lost(prompts, 3) != wanted
        answers = LateContinuations(evaluation, loaded.tokenizer, there, None, prompts_too=False)
        # Prompts are computed exactly: so are their first tokens, and no others.
        assert answers(prompts, 1) == exact(prompts, 1)
        assert answers(prompts, 3) != wanted


def test_recall_under_a_bad_network_is_worse_than_exact() -> None:
    found = recall(imagined((6,), 6, share=1.0, loss=0.2), 60)
    assert found["exact"] > 0.95
    assert found["relaxed"] < 0.5 * found["exact"]
