"""Profiles follow measurements, and plans change only when that is worth it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scheduler.drift import LEAST_AGREEMENT, Drift, MeasuredWorker
from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile, Worker

MODEL = ModelProfile(22, 22, 884_736, 5_000_000, 36_000_000, 25, 36_000_000, 2176, 8192, 256)
WORKER = Worker(DeviceProfile("w", 1e10, 10**9, overhead_seconds=5e-5), LinkProfile(2e-3, 2e-4, 1e8))


def test_profile_follows_the_exchanges() -> None:
    random, measured = np.random.default_rng(0), MeasuredWorker(WORKER, MODEL)
    weights, travel = 8_000_000, (2176 + 8192) / 1e8
    for _ in range(400):
        computing = 5e-5 + weights / 4e9
        measured.answered(computing + travel + float(random.normal(6e-3, 5e-4)), computing, weights)
    now = measured.profile()
    assert now.device.bytes_per_second == pytest.approx(4e9, rel=0.02)
    assert now.link.round_trip_seconds == pytest.approx(6e-3, rel=0.1)
    assert now.link.jitter_seconds == pytest.approx(5e-4, rel=0.5)
    assert now.device.memory_bytes == WORKER.device.memory_bytes


def test_impossible_measurements_change_nothing() -> None:
    measured = MeasuredWorker(WORKER, MODEL)
    measured.answered(1e-3, 2e-3, 1000)
    measured.answered(float("nan"), 0.0, 1000)
    measured.answered(-1.0, -2.0, 1000)
    assert measured.profile() == WORKER


def test_share_that_took_no_time_leaves_a_finite_speed() -> None:
    measured = MeasuredWorker(WORKER, MODEL)
    for _ in range(1000):
        measured.answered(1e-3, 0.0, 10_000)
    assert measured.profile().device.bytes_per_second < 1e14


def test_losses_and_silence_show() -> None:
    measured = MeasuredWorker(WORKER, MODEL)
    for number in range(4000):
        measured.sent(10, int(number % 2 == 0))
    assert measured.profile().link.loss == pytest.approx(0.05, abs=0.03)
    for _ in range(30):
        measured.failed()
    assert measured.profile().device.reliability < 0.2
    for _ in range(60):
        measured.answered(3e-3, 1e-3, 8_000_000)
    assert measured.profile().device.reliability > 0.9


def test_temperature_and_battery_of_the_moment_count() -> None:
    hot = MeasuredWorker(WORKER, MODEL).profile(temperature=90.0)
    assert hot.device.is_strained and not WORKER.device.is_strained


def test_changes_only_after_agreement() -> None:
    drift = Drift(interval=100.0)
    answers = [drift.consider(1.0, 0.8, float(now)) for now in range(LEAST_AGREEMENT)]
    assert answers == [False] * (LEAST_AGREEMENT - 1) + [True]


def test_small_or_passing_gains_change_nothing() -> None:
    drift = Drift(interval=0.0)
    assert not any(drift.consider(1.0, 0.95, float(now)) for now in range(100))
    for now in range(100, 200):
        better = 0.5 if now % LEAST_AGREEMENT else 1.0
        assert not drift.consider(1.0, better, float(now))


def test_no_second_change_before_the_interval_has_passed() -> None:
    drift = Drift(interval=50.0)
    changes = [now for now in range(200) if drift.consider(1.0, 0.5, float(now))]
    assert changes[0] == LEAST_AGREEMENT - 1
    assert all(later - before >= 50 for before, later in itertools.pairwise(changes))
    assert len(changes) > 2


def test_change_for_another_reason_starts_the_interval_too() -> None:
    drift = Drift(interval=50.0)
    drift.changed(0.0)
    assert not any(drift.consider(1.0, 0.5, float(now)) for now in range(1, 50))
    assert drift.consider(1.0, 0.5, 50.0)
