"""What plans predict is what happens to virtual nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler_plan import WIRED, WIRELESS, device, importance, model, response

from scheduler.errors import SchedulingError
from scheduler.plan import Plan, Worker, make_plan
from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile
from scheduler.simulator import Simulation, simulate
from scheduler.timing import Mode


def lossy(loss: float) -> LinkProfile:
    return LinkProfile(4.2e-3, 7e-4, 1e8, loss, 5e-5)


def run(workers: list[Worker], mode: Mode, part: float = 0.6, tokens: int = 200) -> tuple[Plan, Simulation]:
    profile, coordinator = model(), device("c", part)
    plan = make_plan(profile, coordinator, workers, importance(profile), mode=mode, response=response())
    return plan, simulate(plan, profile, coordinator, workers, n_tokens=tokens, mode=mode)


@pytest.mark.parametrize("mode", ["exact", "relaxed"])
@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("count", [1, 3])
def test_predicted_time_is_what_happens(count: int, loss: float, mode: Mode) -> None:
    # Two hundred tokens of a dozen waits: the mean scatters by less than one per cent.
    plan, found = run([Worker(device("w", 0.6), lossy(loss))] * count, mode)
    assert plan.seconds_per_token == pytest.approx(float(found.seconds.mean()), rel=0.10)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(4e9, 3e10), st.floats(1e-4, 6e-3), st.floats(0, 3e-4), st.sampled_from([0, 0.02, 0.1])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_predicted_time_holds_for_unequal_nodes(nodes: list[tuple[float, float, float, float]]) -> None:
    workers = [
        Worker(device(f"w{i}", 0.5, speed), LinkProfile(trip, min(jitter, trip / 3), 1e8, loss, 5e-5))
        for i, (speed, trip, jitter, loss) in enumerate(nodes)
    ]
    plan, found = run(workers, "exact", 0.7)
    assert plan.seconds_per_token == pytest.approx(float(found.seconds.mean()), rel=0.10)


def test_exact_loses_nothing_and_nothing_is_late() -> None:
    _, found = run([Worker(device("w", 0.6), lossy(0.2))] * 2, "exact")
    assert found.lost == 0 and not found.late and found.on_time > 0


def test_relaxed_is_late_where_the_plan_says_so_and_loses_little() -> None:
    plan, found = run([Worker(device("w", 0.6), lossy(0.1))], "relaxed")
    every = found.on_time + sum(found.late.values()) + found.lost
    assert plan.late_increase > 0 and sum(found.late.values()) > 0.2 * every
    assert found.lost < 0.003 * every


def test_relaxed_hardly_minds_loss() -> None:
    clean, _ = run([Worker(device("w", 0.6), lossy(0.0))], "relaxed")
    _, found = run([Worker(device("w", 0.6), lossy(0.05))], "relaxed")
    assert float(found.seconds.mean()) <= 1.1 * clean.seconds_per_token


def test_death_is_made_up_for_by_the_coordinator() -> None:
    profile, coordinator = model(), device("c", 0.6)
    workers = [Worker(device(f"w{i}", 0.6), WIRED) for i in range(2)]
    plan = make_plan(profile, coordinator, workers, importance(profile))
    assert plan.nodes_used == (0, 1, 2)
    found = simulate(plan, profile, coordinator, workers, n_tokens=40, deaths={2: 20})
    alone = simulate(plan, profile, coordinator, workers, n_tokens=40).seconds
    assert found.recomputed > 0 and found.lost == 0
    assert np.array_equal(found.seconds[:20], alone[:20])
    # The token in which it dies waits for it once; those after it only compute more.
    assert found.seconds[20] > found.seconds[21:].max() > found.seconds[:20].max()


def test_same_seed_gives_the_same_run() -> None:
    profile, coordinator, workers = model(), device("c", 0.6), [Worker(device("w", 0.6), lossy(0.1))]
    plan = make_plan(profile, coordinator, workers, importance(profile))
    first, again, other = (
        simulate(plan, profile, coordinator, workers, n_tokens=10, seed=seed).seconds for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_plan_of_one_device_takes_what_it_predicts() -> None:
    profile, coordinator = model(), device("c")
    plan = make_plan(profile, coordinator, [Worker(device("w"), WIRELESS)], importance(profile))
    found = simulate(plan, profile, coordinator, [Worker(device("w"), WIRELESS)], n_tokens=2)
    assert plan.nodes_used == (0,)
    assert found.seconds == pytest.approx(plan.seconds_per_token)


def test_thousand_virtual_nodes() -> None:
    profile = ModelProfile(4, 4000, 100_000, 1_000_000, 10_000_000, 100, 1_000_000, 2000, 4000, 64)
    coordinator = DeviceProfile("c", 1e10, 20_000_000)
    workers = [
        Worker(DeviceProfile(f"w{i}", 1e8, 2_000_000), LinkProfile(1e-3, 1e-4, 1e8, 0.01))
        for i in range(1000)
    ]
    plan = make_plan(profile, coordinator, workers, importance(profile))
    found = simulate(plan, profile, coordinator, workers, n_tokens=3)
    assert len(plan.nodes_used) > 700 and found.lost == 0


def test_impossible_cluster_is_refused_before_it_is_simulated() -> None:
    with pytest.raises(SchedulingError):
        run([Worker(device("w", 0.05), WIRED)], "exact", 0.3)
