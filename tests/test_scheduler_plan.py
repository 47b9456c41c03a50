"""Plans are valid, near the best that exhaustive search finds, and say why they are as they are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import SchedulingError
from scheduler.patience import Response, Rung, ladder, lateness
from scheduler.placement import group_room
from scheduler.plan import Plan, Worker, make_plan, plan_seconds
from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile
from scheduler.timing import TimeModel

WIRED = LinkProfile(2e-4, 3e-5, 1e8, 0.0, 5e-5)
WIRELESS = LinkProfile(4.2e-3, 7e-4, 1e8, 0.0, 5e-5)


def model(n_layers: int = 22, n_groups: int = 22, slices: int = 25) -> ModelProfile:
    """A TinyLlama-1.1B in Q4_0."""
    ffn = 3 * 2048 * 5632 * 9 // 16
    head = 32000 * 2048 * 9 // 16
    return ModelProfile(
        n_layers=n_layers,
        n_groups=n_groups,
        group_bytes=ffn // n_groups,
        attention_bytes=(2 * 2048 * 2048 + 2 * 2048 * 256) * 9 // 16,
        head_bytes=head,
        n_head_slices=slices,
        fixed_bytes=head,
        input_bytes=2176,
        output_bytes=8192,
        group_neurons=5632 // n_groups,
        head_slice_output_bytes=32000 // slices * 4,
    )


def device(name: str = "a", part: float = 10.0, speed: float = 1.75e10, **more: float) -> DeviceProfile:
    """One that holds a part of the model."""
    memory = math.ceil(part * model().total_bytes)
    return DeviceProfile(name, speed, memory, overhead_seconds=5e-5, **more)


def importance(profile: ModelProfile) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(0).uniform(size=(profile.n_layers, profile.n_groups))


def response(n_layers: int = 22, scale: float = 2e-4) -> Response:
    """Layers that cost the more the later; the first and the last ones most."""
    depth = np.arange(n_layers)
    edge = 1 + 20 * ((depth < 2) | (depth >= n_layers - 2))
    late = scale * edge[:, None] * np.arange(1, 7)[None, :] / 3
    rungs = []
    for syncs in ladder(late, n_layers):
        total = sum(late[layer, by - 1] for layer, by in enumerate(lateness(syncs, n_layers)) if by)
        rungs.append(Rung(syncs, (0.25, 0.5, 0.75, 1.0), (total * 0.3, total * 1.2, total * 6, total * 20)))
    return Response(n_layers, late, np.full(n_layers, scale * 10), tuple(rungs))


def check_valid(plan: Plan, profile: ModelProfile, coordinator: DeviceProfile, workers: list[Worker]) -> None:
    """Every group and slice once, within memory, syncs in order."""
    for layer in plan.groups:
        assert sorted(itertools.chain.from_iterable(layer)) == list(range(profile.n_groups))
    slices = sorted(itertools.chain.from_iterable(plan.head_slices))
    assert slices == list(range(profile.n_head_slices))
    memory = [coordinator.memory_bytes, *(worker.device.memory_bytes for worker in workers)]
    assert all(held <= had for held, had in zip(plan.bytes_held, memory, strict=True))
    assert plan.syncs[-1] == profile.n_layers and list(plan.syncs) == sorted(set(plan.syncs))
    for layer, kept in zip(plan.groups, plan.replicas, strict=True):
        assert not set(kept) & set(layer[0])
    used = {0, *(n for n in range(1, len(memory)) if plan.head_slices[n] or any(g[n] for g in plan.groups))}
    assert set(plan.nodes_used) == used
    assert plan.seconds_per_token > 0 and plan.reason


# --- beside exhaustive search -------------------------------------------------------------------

links = st.builds(
    LinkProfile,
    st.floats(2e-5, 5e-3),
    st.floats(0, 5e-4),
    st.floats(1e7, 1e9),
    st.sampled_from([0.0, 0.01, 0.1]),
    st.floats(0, 1e-4),
)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[ModelProfile, DeviceProfile, list[Worker]]:
    n_workers = draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 3 if n_workers < 3 else 2))
    n_groups = draw(st.integers(1, 6 if n_workers < 3 else 4))
    group = 1_000_000
    profile = ModelProfile(
        n_layers, n_groups, group, draw(st.integers(0, 3 * group)), 2 * group, 2, group, 2000, 8000, 64, 4000
    )
    n_blocks = n_layers * n_groups + 4

    def one(name: str, memory: int) -> DeviceProfile:
        speed = draw(st.floats(5e8, 2e10))
        return DeviceProfile(name, speed, memory, overhead_seconds=draw(st.floats(0, 1e-4)))

    own = profile.coordinator_bytes + group * draw(st.integers(0, n_blocks))
    workers = [
        Worker(one(f"w{number}", group * draw(st.integers(0, n_blocks))), draw(links))
        for number in range(n_workers)
    ]
    return profile, one("c", own), workers


def exhaustive(profile: ModelProfile, coordinator: DeviceProfile, workers: list[Worker]) -> float:
    """The least time over every cut of every layer and of the head; layers in any order take the same."""
    time = TimeModel(profile, coordinator, workers)
    n_nodes = 1 + len(workers)

    def cuts(total: int) -> list[tuple[int, ...]]:
        return [cut for cut in itertools.product(range(total + 1), repeat=n_nodes) if sum(cut) == total]

    rows = cuts(profile.n_groups)
    seconds = [time.run_seconds(np.array([row]), "exact") for row in rows]
    combinations = [
        (sum(seconds[i] for i in chosen), np.sum([rows[i] for i in chosen], axis=0))
        for chosen in itertools.combinations_with_replacement(range(len(rows)), profile.n_layers)
    ]
    combinations.sort(key=lambda found: found[0])
    best = math.inf
    for head in cuts(profile.n_head_slices):
        room = group_room(profile, coordinator, workers, head)
        fits = (total for total, held in combinations if np.all(held <= room))
        best = min(best, next(fits, math.inf) + time.head(head))
    if coordinator.memory_bytes >= profile.total_bytes:
        best = min(best, time.alone_seconds)
    return best


@settings(max_examples=60, deadline=None)
@given(small_cases())
def test_plan_is_within_five_per_cent_of_exhaustive_search(
    case: tuple[ModelProfile, DeviceProfile, list[Worker]],
) -> None:
    profile, coordinator, workers = case
    best = exhaustive(profile, coordinator, workers)
    if best == math.inf:
        with pytest.raises(SchedulingError):
            make_plan(profile, coordinator, workers, importance(profile))
        return
    plan = make_plan(profile, coordinator, workers, importance(profile))
    check_valid(plan, profile, coordinator, workers)
    assert plan.seconds_per_token <= 1.05 * best + 1e-9


# --- validity -----------------------------------------------------------------------------------


@st.composite
def clusters(draw: st.DrawFn) -> tuple[DeviceProfile, list[Worker]]:
    def one(name: str) -> DeviceProfile:
        part = draw(st.floats(0.05, 1.2))
        reliability = draw(st.sampled_from([1.0, 0.7, 0.0]))
        return device(name, part, draw(st.floats(2e9, 3e10)), reliability=reliability)

    workers = [Worker(one(f"w{i}"), draw(links)) for i in range(draw(st.integers(0, 7)))]
    return one("c"), workers


@settings(max_examples=25, deadline=None)
@given(clusters(), st.sampled_from(["exact", "relaxed"]))
def test_every_plan_is_valid(case: tuple[DeviceProfile, list[Worker]], mode: str) -> None:
    coordinator, workers = case
    profile = model(n_layers=8, n_groups=11)
    try:
        plan = make_plan(
            profile, coordinator, workers, importance(profile), mode=mode, response=response(8), quality=0.99
        )
    except SchedulingError:
        memory = coordinator.memory_bytes + sum(worker.device.memory_bytes for worker in workers)
        no_core = coordinator.memory_bytes < profile.coordinator_bytes
        # What does not divide into whole groups is lost on every node.
        assert no_core or memory < profile.total_bytes + (1 + len(workers)) * profile.group_bytes * 2
        return
    check_valid(plan, profile, coordinator, workers)


def test_same_arguments_give_the_same_plan() -> None:
    workers = [Worker(device(f"w{i}", 0.4), WIRELESS) for i in range(3)]
    arguments = (model(), device("c", 0.5), workers, importance(model()))
    plans = [make_plan(*arguments, mode="relaxed", response=response(), number=7) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0].number == 7


def test_plan_for_64_nodes_and_80_layers_is_valid() -> None:
    profile = ModelProfile(80, 56, 3_000_000, 50_000_000, 150_000_000, 125, 150_000_000, 8704, 32768, 512)
    random = np.random.default_rng(0)
    workers = [
        Worker(
            DeviceProfile(f"w{i}", float(random.uniform(5e9, 3e10)), int(random.uniform(1e8, 1e9))),
            LinkProfile(float(random.uniform(2e-4, 8e-3)), 1e-4, 1e8, float(random.choice([0, 0.05])), 1e-5),
        )
        for i in range(63)
    ]
    coordinator = DeviceProfile("c", 2e10, 6_000_000_000)
    plan = make_plan(profile, coordinator, workers, importance(profile))
    check_valid(plan, profile, coordinator, workers)
    assert plan.nodes_used != (0,)


def test_more_nodes_are_never_slower() -> None:
    """A further worker may be left out, so it never costs more than what the search misses."""
    profile, coordinator = model(), device("c", 0.6)
    seconds = [
        make_plan(profile, coordinator, [Worker(device("w", 0.6), WIRED)] * count, importance(profile))
        for count in (1, 2, 4, 8)
    ]
    times = [plan.seconds_per_token for plan in seconds]
    assert all(later <= 1.02 * before for before, later in itertools.pairwise(times)), times


# --- what is chosen -----------------------------------------------------------------------------


def test_one_device_is_used_where_the_link_is_slower_than_computing() -> None:
    plan = make_plan(model(), device("c"), [Worker(device("w"), WIRELESS)], importance(model()))
    assert plan.nodes_used == (0,) and plan.round_trips == 0
    assert plan.seconds_per_token == plan.alone_seconds
    assert plan.reason.startswith("1 of 2 devices is used: c alone takes")


def test_quick_link_is_used_and_the_slow_one_named() -> None:
    slow = LinkProfile(38e-3, 1e-3, 1e7)
    workers = [Worker(device("near"), WIRED), Worker(device("pi-4"), slow)]
    plan = make_plan(model(), device("c"), workers, importance(model()))
    assert plan.nodes_used == (0, 1)
    assert plan.alone_seconds is not None and plan.seconds_per_token < plan.alone_seconds
    assert plan.reason.startswith("2 of 3 devices are used: the link to pi-4 (")


def test_memory_forces_groups_out_over_few_layers_where_links_are_slow() -> None:
    plan = make_plan(model(), device("c", 0.6), [Worker(device("w", 0.6), WIRELESS)], importance(model()))
    assert plan.alone_seconds is None
    assert plan.reason == "both devices are used: the model does not fit c alone"
    # Each remote layer costs 4 ms, a whole layer computes in 1.4: rather few layers, and most of each.
    assert plan.round_trips <= 13
    assert plan.syncs == tuple(range(1, 23))


def test_relaxed_waits_less_often_and_is_faster_within_the_allowance() -> None:
    arguments = (model(), device("c", 0.6), [Worker(device("w", 0.6), WIRELESS)], importance(model()))
    exact = make_plan(*arguments)
    plans = [
        make_plan(*arguments, mode="relaxed", response=response(), quality=q) for q in (0.999, 0.99, 0.9)
    ]
    for plan in plans:
        assert 0 <= plan.late_increase <= -0.8 * math.log(plan.quality)
    trips = [plan.round_trips for plan in plans]
    assert trips[0] >= trips[1] >= trips[2] and trips[1] <= exact.round_trips - 4
    assert plans[1].seconds_per_token < 0.75 * exact.seconds_per_token


def test_relaxed_without_calibration_waits_for_every_layer() -> None:
    arguments = (model(), device("c", 0.6), [Worker(device("w", 0.6), WIRELESS)], importance(model()))
    assert make_plan(*arguments, mode="relaxed").syncs == tuple(range(1, 23))


def test_sensitive_layers_are_never_late() -> None:
    arguments = (model(), device("c", 0.6), [Worker(device("w", 0.6), WIRELESS)], importance(model()))
    plan = make_plan(*arguments, mode="relaxed", response=response(), quality=0.995)
    late = lateness(plan.syncs, 22)
    for layer in (0, 1, 20):
        assert late[layer] == 0 or plan.remote_shares[layer] == 0


def test_important_groups_stay_and_the_least_important_go_to_the_least_reliable() -> None:
    profile = model(n_layers=4, n_groups=12)
    scores = importance(profile)
    workers = [
        Worker(device("shaky", 0.5, reliability=0.8), WIRED),
        Worker(device("steady", 0.5), WIRED),
    ]
    plan = make_plan(profile, device("c", 0.2), workers, scores)
    cut = [layer for layer in range(4) if all(plan.groups[layer])]
    assert cut
    for layer in cut:
        own, shaky, steady = (scores[layer, list(held)] for held in plan.groups[layer])
        assert own.min() > steady.max() and steady.min() > shaky.max()


def test_spare_memory_holds_the_most_important_remote_groups() -> None:
    profile = model()
    scores = np.tile(importance(profile)[:1], (22, 1))
    plan = make_plan(profile, device("c", 0.9), [Worker(device("w"), WIRED)], scores)
    kept = [scores[layer, group] for layer, held in enumerate(plan.replicas) for group in held]
    remote = [
        scores[layer, group]
        for layer, nodes in enumerate(plan.groups)
        for group in nodes[1]
        if group not in plan.replicas[layer]
    ]
    assert kept and (not remote or min(kept) >= max(remote))


@pytest.mark.parametrize(
    "worse", [{"temperature": 85.0}, {"battery": 10.0}, {"reliability": 0.5}], ids=lambda d: next(iter(d))
)
def test_strained_or_unreliable_devices_get_less(worse: dict[str, float]) -> None:
    workers = [Worker(device("well"), WIRED), Worker(device("worse", **worse), WIRED)]
    slow = device("c", speed=4e9)
    counts = make_plan(model(), slow, workers, importance(model())).counts.sum(axis=0)
    assert counts[2] < 0.7 * counts[1]


def test_head_is_spread_only_where_that_pays() -> None:
    slow = LinkProfile(6e-3, 1e-4, 1e8)
    fits = make_plan(model(), device("c", 0.95), [Worker(device("w"), slow)], importance(model()))
    assert len(fits.head_slices[0]) == 25 or fits.round_trips == 1
    quick = make_plan(model(), device("c"), [Worker(device("w"), WIRED)], importance(model()))
    assert 0 < len(quick.head_slices[1]) < 25


def test_model_without_room_says_what_is_needed() -> None:
    workers = [Worker(device("w", 0.2), WIRED)]
    with pytest.raises(SchedulingError, match=r"the model needs 619 MB; c may hold 186 MB and 1 worker 124"):
        make_plan(model(), device("c", 0.3), workers, importance(model()))
    with pytest.raises(SchedulingError, match="attention and embeddings, which cannot be spread"):
        make_plan(model(), device("c", 0.1), [Worker(device("w", 3.0), WIRED)], importance(model()))


def test_arguments_out_of_range_are_refused() -> None:
    arguments = (model(), device("c"), [Worker(device("w"), WIRED)])
    with pytest.raises(SchedulingError, match="importance has the shape"):
        make_plan(*arguments, np.ones((3, 3)))
    with pytest.raises(SchedulingError, match="quality"):
        make_plan(*arguments, importance(model()), quality=0.0)
    with pytest.raises(SchedulingError, match="bytes_per_second is 0"):
        device("c", speed=0)
    with pytest.raises(SchedulingError, match="loss is 1"):
        LinkProfile(1e-3, loss=1.0)


def test_seconds_of_a_plan_follow_new_measurements() -> None:
    workers = [Worker(device("w", 0.6), WIRED)]
    plan = make_plan(model(), device("c", 0.6), workers, importance(model()))
    same = plan_seconds(plan, model(), device("c", 0.6), workers, "exact")
    assert same == pytest.approx(plan.seconds_per_token)
    slower = [Worker(device("w", 0.6), WIRELESS)]
    assert plan_seconds(plan, model(), device("c", 0.6), slower, "exact") > 2 * same
    with pytest.raises(SchedulingError, match="make a new plan"):
        plan_seconds(plan, model(), device("c", 0.6), workers * 2, "exact")


def test_rows_for_a_person_add_up() -> None:
    workers = [Worker(device("w", 0.6), WIRELESS)]
    rows = make_plan(model(), device("c", 0.6), workers, importance(model())).explain()
    assert [row[0] for row in rows] == ["c", "w"]
    assert sum(row[1] for row in rows) == 22 * 22
    assert sum(row[2] for row in rows) == pytest.approx(1.0)
