"""Calibration: windows of a text, importance of groups, costs of lateness, and the command."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cli.calibrate import command
from edge_runtime.cluster.calibration import SHARES, calibrate
from edge_runtime.cluster.calibration_file import Calibration, calibration_path, find_calibration
from edge_runtime.cluster.calibration_text import Window, windows
from edge_runtime.cluster.late_costs import Condition, costs
from edge_runtime.cluster.late_evaluation import LOST, LateEvaluation
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.model import Model
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import RequestError
from models.synthetic import SyntheticModel, write_synthetic_gguf

TEXT = "\f".join(f"THE {word} OF NUMBER {n} IS HERE" for n, word in enumerate(["CAT", "DOG", "HEN"] * 8))
N_LAYERS, N_GROUPS = 3, 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of five groups, none of them alike."""
    path = tmp_path_factory.mktemp("calibration") / "three-layers.gguf"
    shape = SyntheticModel(n_layers=N_LAYERS, n_embd=64, n_ff=N_GROUPS * 32, n_vocab=300, n_ctx=128)
    write_synthetic_gguf(path, shape)
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> Calibration:
    return calibrate(path, TEXT, group_size=32, threads=1)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    with GGUFFile(path) as gguf:
        return Tokenizer(gguf)


# --- text -------------------------------------------------------------------------------------


def pieces_of(window: Window) -> list[list[int]]:
    """Tokens of each sequence of a window."""
    sequences = np.asarray(window.batch.sequences)
    tokens = np.asarray(window.batch.tokens)
    return [tokens[sequences == sequence].tolist() for sequence in range(sequences.max() + 1)]


documents = st.lists(st.text("abc def", min_size=1, max_size=60), min_size=4, max_size=12)


@settings(max_examples=30, deadline=None)
@given(documents, st.integers(8, 64), st.integers(1, 5))
def test_windows_hold_the_text_and_nothing_else(
    tokenizer: Tokenizer, texts: list[str], n_rows: int, n_sequences: int
) -> None:
    texts = [*texts, "x" * 80]
    found = windows(
        tokenizer, "\f".join(texts), n_rows=n_rows, n_sequences=n_sequences, n_scored=n_rows, max_tokens=4096
    )
    wanted = []
    for text in texts:
        tokens = tokenizer.encode(text, add_bos=False)
        for start in range(0, len(tokens), n_rows - 1):
            wanted.append([tokenizer.bos, *tokens[start : start + n_rows - 1]])
    assert [piece for window in found for piece in pieces_of(window)] == wanted
    for window in found:
        assert window.n_rows <= n_rows
        assert len(pieces_of(window)) <= n_sequences
        follows = [token for piece in pieces_of(window) for token in piece[1:]]
        assert window.targets.tolist() == follows


def test_scored_rows_are_spread_evenly(tokenizer: Tokenizer) -> None:
    (window,) = windows(tokenizer, "abcdefgh" * 12, n_rows=128, n_sequences=1, n_scored=10, max_tokens=4096)
    rows = np.asarray(window.batch.logits)
    assert len(rows) == len(window.targets) == 10
    assert rows[0] == 0
    assert rows[-1] == window.n_rows - 2
    assert np.ptp(np.diff(rows)) <= 1
    assert window.targets.tolist() == np.asarray(window.batch.tokens)[rows + 1].tolist()


def test_a_long_text_is_cut_and_a_short_one_refused(tokenizer: Tokenizer) -> None:
    options = {"n_rows": 32, "n_sequences": 2, "n_scored": 32}
    found = windows(tokenizer, "abcd" * 500, max_tokens=100, **options)
    assert sum(window.n_rows for window in found) == 100
    with pytest.raises(RequestError, match="at least 64 are needed"):
        windows(tokenizer, "abcd", max_tokens=100, **options)
    with pytest.raises(RequestError, match="0 tokens"):
        windows(tokenizer, "\f\f", max_tokens=100, **options)


# --- measuring --------------------------------------------------------------------------------


def test_importance_and_means_are_those_of_the_groups(path: Path, found: Calibration) -> None:
    """Each group alone, through the engine's own sparse FFN behind exact layers."""
    with GGUFFile(path) as gguf:
        hp = read_hyperparameters(gguf)
        cut = windows(Tokenizer(gguf), TEXT, n_rows=128, n_sequences=16, n_scored=128, max_tokens=4096)
        with closing(Model(gguf, hp, n_cells=128, n_sequences=16)) as model:
            model.cut_neuron_groups(32)
            for layer, group in ((0, 0), (1, 3), (2, 4)):
                output = Capture("ffn_output", layer)
                alone = []
                for window in cut:
                    for sequence in range(16):
                        model.cells.remove(sequence)
                    batch = window.batch
                    chosen = Batch(
                        batch.tokens, batch.positions, batch.sequences, (), groups={layer: [group]},
                        capture=[output],
                    )  # fmt: skip
                    alone.append(model.forward(chosen).captured[output])
                rows = np.concatenate(alone)
                norm = np.linalg.norm(rows, axis=1).mean()
                assert found.importance[layer, group] == pytest.approx(norm, rel=1e-4)
                np.testing.assert_allclose(found.means[layer, group], rows.mean(axis=0), atol=2e-3)


def test_the_same_text_gives_the_same_calibration(path: Path, found: Calibration) -> None:
    again = calibrate(path, TEXT, group_size=32, threads=1)
    np.testing.assert_array_equal(again.importance, found.importance)
    np.testing.assert_array_equal(again.means, found.means)
    np.testing.assert_array_equal(again.response.late_cost, found.response.late_cost)
    assert again.response.rungs == found.response.rungs
    assert (again.fill, again.perplexity) == (found.fill, found.perplexity)


def test_costs_are_there_for_every_lateness_that_is_possible(found: Calibration) -> None:
    response = found.response
    assert response.late_cost.shape == (N_LAYERS, N_LAYERS - 1)
    for layer in range(N_LAYERS):
        possible = N_LAYERS - 1 - layer
        assert np.isfinite(response.late_cost[layer, :possible]).all()
        assert (response.late_cost[layer, :possible] > 0).all()
        assert np.isinf(response.late_cost[layer, possible:]).all()
    assert (response.lost_cost > 0).all()


def test_rungs_go_from_all_boundaries_to_one(found: Calibration) -> None:
    rungs = found.response.rungs
    assert [len(rung.syncs) for rung in rungs] == [3, 2, 1]
    assert all(rung.shares == SHARES for rung in rungs)
    assert rungs[0].increases == (0, 0, 0, 0)
    assert min(rungs[-1].increases) > 0
    assert found.divergences.shape == found.increases.shape == (3, len(SHARES))
    worst = np.maximum(np.maximum(found.divergences, found.increases), 0)
    assert np.any(found.divergences > found.increases)
    assert np.any(found.divergences < found.increases)
    np.testing.assert_array_equal(worst, [rung.increases for rung in rungs])


def test_one_layer_late_costs_what_the_ladder_measures_of_it_alone(found: Calibration) -> None:
    """With syncs (2, 3) layer 0 alone is late, by one; with (1, 3) layer 1 is."""
    rung = found.response.rungs[1]
    layer = {(2, 3): 0, (1, 3): 1}[rung.syncs]
    half = SHARES.index(0.5)
    assert found.divergences[1, half] == pytest.approx(found.response.late_cost[layer, 0], rel=1e-3)


def test_a_lost_layer_costs_what_its_least_important_half_does(path: Path, found: Calibration) -> None:
    """Three of five groups, by the engine's own sparse FFN; from the logits, by the formulas."""
    layer = 1
    kept = np.argsort(found.importance[layer])[3:].tolist()
    divergence = increase = loss = 0.0
    n_tokens = 0
    with GGUFFile(path) as gguf:
        hp = read_hyperparameters(gguf)
        cut = windows(Tokenizer(gguf), TEXT, n_rows=128, n_sequences=16, n_scored=128, max_tokens=4096)
        with closing(Model(gguf, hp, n_cells=128, n_sequences=16)) as model:
            model.cut_neuron_groups(32)
            evaluation = LateEvaluation(model, GroupSlices(gguf, hp, 32))
            evaluation.split([[[], [g for g in range(N_GROUPS) if g not in kept], []]])
            lost = np.zeros((1, N_LAYERS, 1), np.int8)
            lost[:, layer] = LOST
            same = costs(evaluation, cut, [Condition(lost)])
            evaluation.close()
            for window in cut:
                for sequence in range(16):
                    model.cells.remove(sequence)
                batch = window.batch
                places = (batch.tokens, batch.positions, batch.sequences, batch.logits)
                both = [model.forward(Batch(*places, groups=groups)).logits for groups in ({}, {layer: kept})]
                exact, without = (
                    logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) for logits in both
                )
                divergence += float((np.exp(exact) * (exact - without)).sum())
                rows = np.arange(len(window.targets))
                loss -= float(exact[rows, window.targets].sum())
                increase += float((exact - without)[rows, window.targets].sum())
                n_tokens += len(rows)
    assert found.n_tokens == same.n_tokens == n_tokens
    assert found.perplexity == pytest.approx(np.exp(loss / n_tokens), rel=1e-4)
    assert found.response.lost_cost[layer] == pytest.approx(divergence / n_tokens, rel=1e-3)
    assert same.of[0].divergence == pytest.approx(divergence / n_tokens, rel=1e-3)
    assert same.of[0].increase == pytest.approx(increase / n_tokens, rel=1e-2, abs=1e-5)


def test_progress_rises_to_the_end(path: Path) -> None:
    shares: list[float] = []
    calibrate(path, TEXT, group_size=32, threads=1, max_tokens=100, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert len(shares) > 10


def test_too_few_groups_and_tokens_are_refused(path: Path) -> None:
    with pytest.raises(RequestError, match="smaller group size"):
        calibrate(path, TEXT, group_size=64)
    with pytest.raises(RequestError, match="tokens"):
        calibrate(path, "too short")
    with pytest.raises(RequestError, match="tokens"):
        calibrate(path, TEXT, max_tokens=0)


# --- the command ------------------------------------------------------------------------------


def test_the_command_keeps_what_it_measured_beside_the_model(path: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(path, tmp_path / "model.gguf"))
    text = tmp_path / "text"
    text.write_text(TEXT)
    arguments = [str(model), "--text", str(text), "--group-size", "32", "-t", "1"]
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert facts["path"] == str(calibration_path(model))
    assert [len(entry["boundaries"]) for entry in facts["syncs"]] == [3, 2, 1]
    assert min(facts["syncs"][2]["perplexity_ratios"]) > 1
    with GGUFFile(model) as gguf:
        kept = find_calibration(gguf)
    assert kept is not None
    assert kept.n_tokens == facts["tokens"]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False).stdout
    assert "3 layers of 5 groups of 32 neurons" in shown
    assert "quality 0.99: " in shown


def test_the_command_refuses_what_is_no_text(path: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "text"
    wrong.write_bytes(b"\xff\xfe" * 100)
    done = CliRunner().invoke(command, [str(path), "--text", str(wrong)])
    assert isinstance(done.exception, RequestError)
    assert CliRunner().invoke(command, [str(path)]).exit_code == 2
