"""Timers follow what was measured, and stay within their floors and caps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.deadlines import DEADLINE_CAP, HARD_CAP, RESEND_CAP, RESEND_FLOOR, Tail, Tails


def tail_of(times: list[float]) -> Tail:
    tail = Tail()
    for seconds in times:
        tail.observe(seconds)
    return tail


def normal(mean: float, deviation: float, count: int = 2000, seed: int = 0) -> list[float]:
    return np.maximum(np.random.default_rng(seed).normal(mean, deviation, count), 0).tolist()


def test_estimates_follow_the_measured_times() -> None:
    tail = tail_of(normal(5e-3, 4e-4))
    assert tail.mean == pytest.approx(5e-3, rel=0.1)
    assert tail.percentile(0.5) == pytest.approx(5e-3, rel=0.1)
    assert 5.5e-3 < tail.percentile(0.99) < 6.6e-3
    assert 5e-3 < tail.resend_after() < 9e-3


def test_few_answers_come_after_the_deadline() -> None:
    times = normal(5e-3, 4e-4, 4000)
    tail, late = Tail(), 0
    for number, seconds in enumerate(times):
        late += number > 100 and seconds > tail.deadline()
        tail.observe(seconds)
    assert late < 0.06 * len(times)


@given(st.lists(st.floats(0, 10), max_size=60))
def test_timers_are_ordered_and_bounded(times: list[float]) -> None:
    tail = tail_of(times)
    assert RESEND_FLOOR <= tail.resend_after() <= RESEND_CAP
    assert tail.resend_after(1) >= tail.resend_after(0)
    assert 0 < tail.deadline() <= DEADLINE_CAP
    assert tail.hard_limit() <= HARD_CAP
    assert tail.hard_limit() >= min(tail.deadline(), tail.resend_after())


@given(st.lists(st.floats(1e-4, 5.0), min_size=1, max_size=300))
def test_percentile_is_at_most_one_bin_too_long(times: list[float]) -> None:
    tail, ordered = tail_of(times), sorted(times)
    for share in (0.5, 0.9, 0.99, 1.0):
        true = ordered[min(len(times) - 1, max(0, math.ceil(share * len(times) - 1e-9) - 1))]
        assert true * 0.999 <= tail.percentile(share) <= true * 2 ** (1 / 8) * 1.001


def test_slower_link_is_learned_and_the_past_forgotten() -> None:
    tail = tail_of(normal(2e-3, 1e-4, 4000) + normal(2e-2, 1e-4, 4000))
    assert tail.mean == pytest.approx(2e-2, rel=0.05)
    assert tail.percentile(0.5) > 1.5e-2


def test_what_is_not_a_time_is_ignored() -> None:
    tail = tail_of([5e-3])
    for wrong in (math.nan, math.inf, -1.0):
        tail.observe(wrong)
    assert tail.samples == 1 and tail.mean == 5e-3


def test_expected_time_serves_until_there_are_measurements() -> None:
    tails = Tails([4e-3, None])
    assert tails.resend_after(1) < tails.resend_after(2)
    tails.observe(2, 4e-3)
    tails.observe(2, 4e-3)
    assert tails.resend_after(2) < 2e-2
    assert tails.deadline(1) >= 4e-3 and tails.hard_limit(1) > tails.deadline(1)
    assert tails.p99(2) < 5e-3
