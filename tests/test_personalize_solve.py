"""Closed-form parts of an edit: Woodbury's identity, readouts, joint solutions, the sketch of the keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.personalize.joint import Part, parts_of, solution_of, solve_together, subjects_of
from edge_runtime.personalize.records import Record
from edge_runtime.personalize.sketch import Sketch
from edge_runtime.personalize.solve import RIDGE, STIFFNESS, KeyCovariance, readouts

N_FF, N_EMBD, LAYER = 48, 8, 2


def drawn(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ordinary(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Keys with strong common directions, as real ones have."""
    return (drawn((count, 12), seed) * np.geomspace(5, 0.2, 12)) @ drawn((12, N_FF), seed + 1) + 0.05 * drawn(
        (count, N_FF), seed + 2
    )


def dense(samples: NDArray[np.floating], ridge: float = RIDGE) -> NDArray[np.float64]:
    """C itself, which the product never forms."""
    wide = samples.astype(np.float64)
    return wide.T @ wide / len(wide) + ridge * (wide**2).mean() * np.eye(wide.shape[1])


def test_large_ones_are_taken_part_by_part() -> None:
    samples, keys = drawn((300, 600), 1), drawn((3, 600), 2)
    wanted = np.linalg.solve(dense(samples), keys.astype(np.float64).T).T
    np.testing.assert_allclose(KeyCovariance(samples).whitened(keys), wanted, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 90), n_keys=st.integers(1, 6), seed=st.integers(0, 1000))
def test_woodbury_is_the_dense_inverse(count: int, n_keys: int, seed: int) -> None:
    """With fewer samples than n_ff and with more."""
    samples, keys = ordinary(count, seed), drawn((n_keys, N_FF), seed + 5)
    wanted = np.linalg.solve(dense(samples), keys.astype(np.float64).T).T
    found = KeyCovariance(samples).whitened(keys)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_readouts_minimise_what_memit_minimises() -> None:
    """``D = Rᵀ (lambda I + K C⁻¹ Kᵀ)⁻¹ K C⁻¹``, written out with the dense matrix."""
    samples, keys, wanted = ordinary(40), drawn((5, N_FF), 3), drawn((5, 2), 4)
    inverse = np.linalg.inv(dense(samples))
    wide = keys.astype(np.float64)
    inner = wide @ inverse @ wide.T
    stiffness = STIFFNESS * np.trace(inner) / 5
    expected = (np.linalg.solve(inner + stiffness * np.eye(5), wanted)).T @ wide @ inverse
    found = readouts(KeyCovariance(samples), keys, wanted)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_readouts_are_as_asked_at_the_keys_and_nothing_at_ordinary_ones() -> None:
    samples = ordinary(200)
    keys = drawn((3, N_FF), 9)
    found = readouts(KeyCovariance(samples), keys, np.eye(3), stiffness=1e-6)
    np.testing.assert_allclose(keys @ found.T, np.eye(3), atol=1e-3)
    assert np.abs(samples @ found.T).mean() < 0.1


def test_the_keys_scale_does_not_matter() -> None:
    samples, keys = ordinary(60), drawn((4, N_FF), 2)
    plain = readouts(KeyCovariance(samples), keys, np.ones((4, 1)))
    scaled = readouts(KeyCovariance(samples * np.float32(64)), keys, np.ones((4, 1)))
    np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-5 * np.abs(plain).max())


# --- several edits ----------------------------------------------------------------------------


def part(subject: str, seed: int, n_keys: int = 3) -> Part:
    """A subject's keys are alike."""
    own = drawn((1, N_FF), sum(map(ord, subject)))
    return Part(subject, own + 0.05 * drawn((n_keys, N_FF), seed), drawn((N_EMBD,), seed + 50))


def effect(solved: dict[int, tuple[object, ...]], keys: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n_embd,) what all changes together add for the mean of some keys."""
    total = np.zeros(N_EMBD)
    for changes in solved.values():
        for change in changes:
            total += change.scale * (change.b @ (change.a @ keys.mean(axis=0)))  # type: ignore[attr-defined]
    return total


@pytest.fixture(scope="module")
def covariance() -> KeyCovariance:
    return KeyCovariance(ordinary(60))


def test_each_subject_gets_its_own_change(covariance: KeyCovariance) -> None:
    ann, bo, two = part("Ann", 1), part("Bo", 2), part("Cy", 3)
    solved = solve_together(covariance, LAYER, {1: [ann], 7: [bo, two]})
    assert list(solved) == [1, 7]
    assert [change.matrix for (change,) in solved.values()] == [f"blk.{LAYER}.ffn_down.weight"] * 2
    assert [change.a.shape for (change,) in solved.values()] == [(1, N_FF), (2, N_FF)]
    assert [change.b.shape for (change,) in solved.values()] == [(N_EMBD, 1), (N_EMBD, 2)]
    for one in (ann, bo, two):
        found = effect(solved, one.keys)
        assert np.linalg.norm(found - one.delta) < 0.2 * np.linalg.norm(one.delta)


def test_together_they_spoil_each_other_less_than_alone(covariance: KeyCovariance) -> None:
    ann, bo = part("Ann", 1), part("Ann Bo", 2)
    near = Part("Bo", (0.7 * ann.keys + 0.7 * bo.keys), bo.delta)  # a key much like Ann's
    apart = {
        **solve_together(covariance, LAYER, {1: [ann]}),
        **solve_together(covariance, LAYER, {2: [near]}),
    }
    together = solve_together(covariance, LAYER, {1: [ann], 2: [near]})
    for one in (ann, near):
        assert np.linalg.norm(effect(together, one.keys) - one.delta) < 0.5 * np.linalg.norm(
            effect(apart, one.keys) - one.delta
        )


def test_changes_of_one_subject_add_up(covariance: KeyCovariance) -> None:
    first, second = part("Ann", 1), part("Ann", 2)
    solved = solve_together(covariance, LAYER, {1: [first], 2: [second]})
    wanted = first.delta + second.delta
    for one in (first, second):
        assert np.linalg.norm(effect(solved, one.keys) - wanted) < 0.2 * np.linalg.norm(wanted)
    alone = solve_together(covariance, LAYER, {2: [second]})
    assert np.linalg.norm(effect(alone, first.keys) - second.delta) < 0.2 * np.linalg.norm(second.delta)


def test_nothing_standing_needs_no_change(covariance: KeyCovariance) -> None:
    assert solve_together(covariance, LAYER, {}) == {}


def test_parts_are_kept_and_read_back() -> None:
    parts = [part("Ann", 1), part("Bo", 2, n_keys=5)]
    request = {"queries": [{"prompt": "p", "subject": name} for name in ("Ann", "Bo", "Ann")]}
    record = Record(1, "a", "demo", "a" * 64, "forget", "applied", 0.0, 0.0, request, {}, "")
    found = parts_of(record, solution_of(LAYER, parts))
    assert [one.subject for one in found] == subjects_of(request) == ["Ann", "Bo"]
    for one, wanted in zip(found, parts, strict=True):
        np.testing.assert_array_equal(one.keys, wanted.keys)
        np.testing.assert_array_equal(one.delta, wanted.delta)
    assert subjects_of({"prompt": "p", "subject": "Ann", "target": "t"}) == ["Ann"]


# --- the sketch -------------------------------------------------------------------------------


def second_moment(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide.T @ wide / len(wide)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("rows", [20, 30, 48, 60])
def test_a_sketch_keeps_what_vectors_have_in_common(rows: int, chunk: int) -> None:
    """Frequent Directions' own bound: the error is at most the squares that are not kept, shared out."""
    vectors = ordinary(1000)
    sketch = Sketch(rows, N_FF)
    for start in range(0, len(vectors), chunk):
        sketch.add(vectors[start : start + chunk])
    assert sketch.seen == 1000
    samples = sketch.samples()
    assert samples.dtype == np.float32 and 0 < len(samples) <= rows
    true, kept = second_moment(vectors), second_moment(samples)
    error = np.linalg.norm(true - kept, ord=2)
    values = np.linalg.eigvalsh(true)[::-1]
    assert error <= values[12:].sum() / (rows - 12) + 1e-5 * values[0]
    # What it takes away it takes away: no direction seems more common than it is.
    assert np.linalg.eigvalsh(true - kept).min() > -1e-5 * values[0]


def test_a_sketch_of_few_vectors_has_all_of_them() -> None:
    vectors = ordinary(15)
    sketch = Sketch(20, N_FF)
    sketch.add(vectors)
    np.testing.assert_allclose(second_moment(sketch.samples()), second_moment(vectors), rtol=1e-4, atol=1e-5)
    assert Sketch(20, N_FF).samples().shape == (0, N_FF)
