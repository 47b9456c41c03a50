"""The engine computes what llama.cpp computes: a part of ``benchmarks.correctness``, and its own measures."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.correctness_comparison import (
    GREEDY_TOKENS,
    KL_FLOOR,
    Case,
    Outcome,
    compare,
    divergences,
    nan_as_infinity,
)
from benchmarks.correctness_random import ARCHITECTURES, QUANTIZATIONS, random_cases
from benchmarks.correctness_sides import Ours, prompt_logits
from benchmarks.correctness_trained import DEMO, FILE_TYPES, STORIES, requantized, stories, written_by

needs_stories = pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is absent")


def only(cases: Iterator[Case]) -> tuple[Iterator[Case], Case]:
    """The one case of a generator, which deletes its file once it is asked for the next."""
    return cases, next(cases)


def check(outcome: Outcome) -> None:
    assert outcome.holds, outcome
    if outcome.exact:
        assert outcome.delta <= 1e-3
        assert set(outcome.same_text) == {GREEDY_TOKENS}


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_each_architecture_and_rope_scaling(architecture: str, quantization: str, tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, (architecture,), (quantization,), ("ff172",)))
    check(compare(case))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_each_quantization(quantization: str, tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, ("llama",), (quantization,), ("kv1",)))
    check(compare(case))


@pytest.mark.parametrize("shape", ["ff1376", "kv3"])
@pytest.mark.parametrize("quantization", ["F16", "Q4_0", "Q4_K"])
def test_each_shape(shape: str, quantization: str, tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, ("qwen3",), (quantization,), (shape,)))
    check(compare(case))


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_K", "IQ4_NL"])
def test_weights_left_in_the_file(quantization: str, tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, ("llama",), (quantization,), ("kv1",)))
    check(compare(case, repack=False))


def test_two_threads(tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, ("llama",), ("Q4_K",), ("ff1376",)))
    check(compare(case, threads=2))


@needs_stories
@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0", "Q4_K_M"])
def test_trained_weights(file_type: str, tmp_path: Path) -> None:
    text = written_by(STORIES, 1, 448)
    prompts = tuple(text[:length] for length in (1, 7, 128, 448))
    path = requantized(STORIES, file_type, tmp_path / "model.gguf")
    check(compare(Case("stories", file_type, path, 512, prompts)))


@needs_stories
def test_stories260k_writes_the_same_story() -> None:
    mine, theirs = stories(STORIES)
    assert mine == theirs
    assert len(mine) > 200


@pytest.mark.skipif(not DEMO.exists(), reason=f"{DEMO} is not built yet: python -m models.demo.train")
def test_the_demo_model(tmp_path: Path) -> None:
    text = written_by(DEMO, 1, 128)
    check(compare(Case("demo", "Q8_0", DEMO, 256, (text[:1], text[:7], text))))


# --- the measures themselves: they would report a difference ----------------------------------------


def test_a_changed_weight_fails_the_comparison(tmp_path: Path) -> None:
    _cases, case = only(random_cases(tmp_path, ("llama",), ("F32",), ("ff172",)))
    changed = tmp_path / "changed.gguf"
    content = bytearray(case.path.read_bytes())
    weights = np.frombuffer(content, np.float32, count=1024, offset=len(content) // 8 * 4)
    weights *= 2  # a few rows of one matrix in the middle of the file
    changed.write_bytes(content)
    prompt = case.prompts[2]
    sides = [Ours(path, context=256) for path in (case.path, changed)]
    original, other = (prompt_logits(side, prompt) for side in sides)
    for side in sides:
        side.close()
    delta = float((np.abs(original - other).max(axis=1) / np.ptp(original, axis=1)).max())
    kl = float(divergences(other, original).mean())
    assert not Outcome("changed", "F32", True, delta, [GREEDY_TOKENS], 0.0, 0.0).holds
    assert not Outcome("changed", "Q8_0", False, 0.0, [], kl, 1e-6).holds


def test_divergence_of_known_distributions() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])).astype(np.float32)
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1]])).astype(np.float32) + np.float32(3)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergences(logits, reference) == pytest.approx([expected, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("outcome", "holds"),
    [
        (Outcome("", "F32", True, 1e-3, [64], 0.0, 0.0), True),
        (Outcome("", "F32", True, 1.1e-3, [64], 0.0, 0.0), False),
        (Outcome("", "F32", True, 0.0, [64, 63], 0.0, 0.0), False),
        (Outcome("", "Q8_0", False, 0.5, [3], 2e-3, 1e-3), True),
        (Outcome("", "Q8_0", False, 0.5, [3], 2.1e-3, 1e-3), False),
        (Outcome("", "Q8_0", False, 0.5, [3], KL_FLOOR, 0.0), True),
        (Outcome("", "Q8_0", False, 0.5, [3], 2 * KL_FLOOR, 0.0), False),
        (Outcome("", "Q8_0", False, math.inf, [3], math.inf, 1.0), False),
    ],
)
def test_the_bars(outcome: Outcome, holds: bool) -> None:
    assert outcome.holds is holds


def test_not_a_number_counts_as_infinitely_far() -> None:
    assert nan_as_infinity(np.float64(math.nan)) == math.inf


def test_every_quantization_of_the_matrix_has_a_file_type() -> None:
    assert {name.removesuffix("_M") for name in FILE_TYPES} == set(QUANTIZATIONS)
