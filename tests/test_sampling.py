"""Sampling: what each step keeps, that seeds repeat, and that odd numbers do no harm."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.engine import sampling
from edge_runtime.engine.sampling import Sampler, SamplingParameters
from edge_runtime.errors import EdgeRuntimeError, RequestError

OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # nothing filtered


def parameters(**changes: Any) -> SamplingParameters:
    return SamplingParameters(**{**OPEN, "seed": 1, **changes})


def logits_of(*probabilities: float) -> NDArray[np.float32]:
    return np.array([math.log(probability) for probability in probabilities], dtype=np.float32)


def kept(logits: NDArray[np.float32], **changes: Any) -> list[int]:
    tokens, _ = Sampler(parameters(**changes), len(logits)).candidates(logits)
    return sorted(int(token) for token in tokens)


def reference(logits: NDArray[np.float32], p: SamplingParameters) -> dict[int, float]:
    """The same steps one after the other over plain lists, as llama.cpp's samplers take them."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if p.top_k:
        order = order[: p.top_k]
    peak = float(logits[order[0]])
    weights = [math.exp(float(logits[token]) - peak) for token in order]
    if p.top_p < 1.0:
        total, running, length = math.fsum(weights), 0.0, 0
        while length < len(order) and (length == 0 or running < p.top_p * total):
            running += weights[length]
            length += 1
        order = order[:length]
    order = [token for token, weight in zip(order, weights, strict=False) if weight >= p.min_p]
    tempered = [math.exp((float(logits[token]) - peak) / p.temperature) for token in order]
    total = math.fsum(tempered)
    return {token: weight / total for token, weight in zip(order, tempered, strict=True)}


def test_temperature_zero_takes_the_likeliest_token_and_the_first_of_equals() -> None:
    logits = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
    assert Sampler(SamplingParameters(temperature=0), 4).sample(logits) == 1


def test_top_k_keeps_the_k_likeliest_and_settles_ties_by_token() -> None:
    assert kept(np.array([1, 2, 2, 2, 0], dtype=np.float32), top_k=2) == [1, 2]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert kept(np.array([1, 2, 3], dtype=np.float32), top_k=40) == [0, 1, 2]


def test_top_p_keeps_the_shortest_leading_part_that_reaches_p() -> None:
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(logits, top_p=0.45) == [0]
    assert kept(logits, top_p=0.75) == [0, 1]
    assert kept(logits, top_p=0.9) == [0, 1, 2]


def test_top_p_that_is_reached_exactly_takes_no_token_more() -> None:
    assert kept(np.zeros(4, dtype=np.float32), top_p=0.5) == [0, 1]


def test_top_p_alone_may_keep_most_of_a_large_vocabulary() -> None:
    assert kept(np.zeros(5000, dtype=np.float32), top_p=0.9) == list(range(4500))
    assert kept(np.zeros(5000, dtype=np.float32), top_p=0.25) == list(range(1250))


def test_top_p_counts_only_what_top_k_left() -> None:
    # Of the first two, 0.5 is 62.5 %: enough for 0.6, though it is not of all four.
    assert kept(logits_of(0.5, 0.3, 0.15, 0.05), top_k=2, top_p=0.6) == [0]


def test_min_p_is_relative_to_the_likeliest_token() -> None:
    assert kept(logits_of(0.5, 0.3, 0.15, 0.05), min_p=0.25) == [0, 1, 2]


def test_temperature_acts_after_the_filters() -> None:
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(logits, top_p=0.75, temperature=50.0) == [0, 1]


def test_temperature_divides_the_logits() -> None:
    _, probabilities = Sampler(parameters(temperature=2.0), 2).candidates(np.array([2, 0], dtype=np.float32))
    assert probabilities[0] / probabilities[1] == pytest.approx(math.e, rel=1e-12)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 3000),
    st.integers(0, 50),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 5.0),
)
def test_candidates_and_probabilities_equal_a_plain_reference(
    seed: int, n_vocab: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = (np.random.default_rng(seed).standard_normal(n_vocab) * 3).astype(np.float32)
    chosen = parameters(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    tokens, probabilities = Sampler(chosen, n_vocab).candidates(logits)
    expected = reference(logits, chosen)
    # Rounding may move a cut by one candidate only where a running sum meets top_p exactly.
    assert abs(len(tokens) - len(expected)) <= 1
    if len(tokens) == len(expected):
        assert set(tokens.tolist()) == set(expected)
        for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True):
            assert probability == pytest.approx(expected[token], rel=1e-9)


def test_draws_follow_the_probabilities() -> None:
    expected = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(parameters(seed=5), 4)
    logits = logits_of(*expected)
    counts = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=4)
    # Four standard deviations of a binomial share with p = 0.5 over 20,000 draws.
    assert np.abs(counts / 20_000 - expected).max() < 4 * math.sqrt(0.25 / 20_000)


def test_a_seed_gives_the_same_tokens_on_every_machine() -> None:
    logits = np.array([token / 16 for token in range(64)], dtype=np.float32)
    sampler = Sampler(SamplingParameters(seed=42, temperature=1.5), 64)
    # Computed once on x86-64; only integer arithmetic and exactly rounded operations lead here.
    assert [sampler.sample(logits) for _ in range(12)] == [43, 54, 39, 46, 62, 32, 43, 42, 61, 54, 56, 35]


def test_a_missing_seed_is_drawn_and_can_be_reported() -> None:
    first, second = (Sampler(SamplingParameters(), 10) for _ in range(2))
    assert first.seed != second.seed
    again = Sampler(SamplingParameters(seed=first.seed), 10)
    logits = np.zeros(10, dtype=np.float32)
    assert [first.sample(logits) for _ in range(20)] == [again.sample(logits) for _ in range(20)]


@given(st.lists(st.floats(-708.0, 0.0), min_size=1, max_size=50))
def test_exp_from_exactly_rounded_operations_is_exp(exponents: list[float]) -> None:
    computed = sampling._exp(np.array(exponents))
    expected = [math.exp(exponent) if exponent > -708.0 else 0.0 for exponent in exponents]
    assert computed == pytest.approx(expected, rel=4e-16, abs=0)  # 2 ulp


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=300), st.data())
def test_largest_equals_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values) - 1))
    logits = np.array(values * 7, dtype=np.float32)
    assert sampling._largest(logits, count).tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


def penalized(window: int = -1, **changes: float) -> NDArray[np.float32]:
    sampler = Sampler(parameters(penalty_window=window, **changes), 4)
    sampler.accept_all([0, 1, 1, 2])
    return sampler._checked(np.array([2.0, 2.0, -2.0, 2.0], dtype=np.float32))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalized(repetition_penalty=2.0).tolist() == [1.0, 1.0, -4.0, 2.0]


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    assert penalized(frequency_penalty=0.5).tolist() == [1.5, 1.0, -2.5, 2.0]
    assert penalized(presence_penalty=0.5).tolist() == [1.5, 1.5, -2.5, 2.0]


def test_penalties_forget_what_left_the_window() -> None:
    assert penalized(window=2, frequency_penalty=0.5).tolist() == [2.0, 1.5, -2.5, 2.0]
    assert penalized(window=0, frequency_penalty=0.5).tolist() == [2.0, 2.0, -2.0, 2.0]


@pytest.mark.parametrize("value", [math.nan, 3.0])
def test_logits_are_left_as_they_are(value: float) -> None:
    logits = np.array([1.0, value, 2.0], dtype=np.float32)
    before = logits.copy()
    sampler = Sampler(parameters(repetition_penalty=1.5), 3)
    sampler.accept_all([0, 1, 2])
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_chosen_and_infinity_always(temperature: float) -> None:
    logits = np.array([math.nan, 1.0, math.inf, -math.inf], dtype=np.float32)
    sampler = Sampler(parameters(temperature=temperature), 4)
    assert {sampler.sample(logits) for _ in range(50)} == {2}
    logits[2] = math.nan
    assert {sampler.sample(logits) for _ in range(50)} == {1}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_number_at_all_is_an_error(value: float) -> None:
    with pytest.raises(EdgeRuntimeError, match="none of the 8 logits"):
        Sampler(SamplingParameters(), 8).sample(np.full(8, value, dtype=np.float32))


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    st.sampled_from([0.0, 5e-324, 1e-300, 0.7, 100.0]),
    st.sampled_from([0, 1, 3, 40]),
    st.sampled_from([1e-300, 0.5, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([0.01, 1.0, 1.3, 10.0]),
)
def test_any_logits_give_a_token_above_minus_infinity_or_the_error(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits = np.array(values, dtype=np.float32)
    chosen = parameters(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    sampler = Sampler(chosen, len(values))
    sampler.accept_all(range(0, len(values), 2))
    usable = [index for index, value in enumerate(values) if value > -math.inf]
    if usable:
        assert sampler.sample(logits) in usable
    else:
        with pytest.raises(EdgeRuntimeError):
            sampler.sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        pytest.param("temperature", 10**400, id="temperature-of-401-digits"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", False),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 11.0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("penalty_window", -2),
        ("penalty_window", 64.0),
        ("seed", -1),
        ("seed", 2**64),
        pytest.param("seed", 10**5000, id="seed-of-5001-digits"),
        ("seed", 1.0),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_range(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{name} is .*; it must be a (whole )?number .* to ") as raised:
        SamplingParameters(**{name: value})  # type: ignore[arg-type]
    assert len(str(raised.value)) < 200


def test_numpy_and_integer_numbers_are_taken_as_plain_ones() -> None:
    chosen = SamplingParameters(temperature=1, top_k=np.int64(5), top_p=np.float32(0.5))  # type: ignore[arg-type]
    assert (chosen.temperature, chosen.top_k, chosen.top_p) == (1.0, 5, 0.5)
    assert [type(value) for value in (chosen.temperature, chosen.top_k, chosen.top_p)] == [float, int, float]


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary of 10 tokens"):
        Sampler(SamplingParameters(), 10).accept(token)


def test_logits_of_another_length_are_refused() -> None:
    with pytest.raises(EdgeRuntimeError, match=r"shape \(9,\)"):
        Sampler(SamplingParameters(), 10).sample(np.zeros(9, dtype=np.float32))
