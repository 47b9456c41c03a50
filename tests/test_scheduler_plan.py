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
    seconds = [time.run(np.array([row]), "exact")[0] for row in rows]
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
