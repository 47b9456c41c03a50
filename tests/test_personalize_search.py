"""The search of an edit on the real model: its directions, its steps, when it ends, and how it goes on."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edit_requests import LONG, QUICK
from editing_parts import FEW, generator, in_float32, objective_of, opened
from numpy.typing import NDArray

from edge_runtime.personalize.contexts import Amounts
from edge_runtime.personalize.estimators import CentralDifferences, Estimator, SpreadSigns
from edge_runtime.personalize.objective import Objective, Point
from edge_runtime.personalize.probes import Probes
from edge_runtime.personalize.resume import Kept, Spent, from_bytes, to_bytes
from edge_runtime.personalize.search import Budget, PlainDescent, State, line_search, search
from edge_runtime.personalize.signs import signs
from edge_runtime.personalize.workspace import Workspace

# --- signs ------------------------------------------------------------------------------------


def test_signs_are_the_same_on_every_processor() -> None:
    """Pinned: integers alone make them, so another machine has the same ones."""
    found = signs(3, 5, 4, 12)
    assert found.dtype == np.float32
    rows = ["".join("+" if sign > 0 else "-" for sign in row) for row in found]
    assert rows == PINNED
    large = signs(1, 2, 256, 192)
    assert large.shape == (256, 192)
    assert hashlib.sha256((large > 0).tobytes()).hexdigest() == PINNED_HASH


PINNED = [
    "+++--+-+----",
    "----+-++-+-+",
    "--+-++----++",
    "-----++++-+-",
]
PINNED_HASH = "992f80ca1efd0d4414c74b95e7c8dce68cbdf38936ea176b1aa1af631b4b6610"


@pytest.mark.parametrize(("count", "width"), [(1, 1), (2, 3), (8, 8), (64, 64), (40, 256), (512, 512)])
def test_rows_of_signs_are_orthogonal_where_the_width_is_a_power_of_two(count: int, width: int) -> None:
    rows = signs(0, 0, count, width)
    assert set(np.unique(rows)) <= {-1.0, 1.0}
    if width & (width - 1) == 0:
        np.testing.assert_array_equal(rows @ rows.T, width * np.eye(count))


def test_rows_of_other_widths_are_nearly_orthogonal() -> None:
    rows = signs(0, 0, 192, 192) / np.sqrt(192)
    products = rows @ rows.T - np.eye(192)
    independent = 1 / 192  # the mean square of random signs' products
    assert (products**2).mean() < independent / 2


def test_each_step_and_seed_has_its_own_signs() -> None:
    drawn = [signs(seed, step, 4, 64).tobytes() for seed in range(3) for step in range(3)]
    assert len(set(drawn)) == 9
    assert signs(0, 1, 4, 64).tobytes() == signs(0, 1, 4, 64).tobytes()


def test_more_signs_than_the_order_are_there() -> None:
    assert signs(0, 0, 20, 4).shape == (20, 4)


# --- steps ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes(demo_model: Path) -> Iterator[Probes]:
    with opened(demo_model) as engine, Workspace(engine) as workspace:
        yield objective_of(engine, workspace)[0].probes


@pytest.fixture(scope="module")
def endless_probes(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probes]:
    path = in_float32(demo_model, tmp_path_factory.mktemp("float32"))
    with opened(path) as engine, Workspace(engine) as workspace:
        yield objective_of(engine, workspace, LONG, FEW)[0].probes


@pytest.fixture
def objective(probes: Probes) -> Objective:
    return Objective(probes)


@pytest.fixture
def endless(endless_probes: Probes) -> Objective:
    """Of a target that the model has no words for, with float32 weights."""
    return Objective(endless_probes)


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def away(objective: Objective, length: float = 1.0) -> Point:
    """A point where nothing is flat."""
    width = objective.probes.width
    delta = generator(3).standard_normal(width) / np.sqrt(width)
    return objective.points(length * objective.scale * delta[None])[0]


ESTIMATORS: list[Estimator] = [
    SpreadSigns(1),
    SpreadSigns(1, antithetic=True),
    SpreadSigns(1, guided=True),
    CentralDifferences(1, directions=32),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["signs", "antithetic", "guided", "Gaussian"])
@pytest.mark.parametrize("length", [0.0, 1.0])
def test_against_the_gradient_the_loss_falls(
    objective: Objective, estimator: Estimator, length: float
) -> None:
    point = away(objective, length)
    gradient = estimator.gradient(objective, point, 0)
    assert gradient.shape == point.delta.shape
    step = 0.2 * objective.scale * gradient / np.linalg.norm(gradient)
    down, up = objective.points(np.stack([point.delta - step, point.delta + step]))
    assert down.loss < point.loss < up.loss


@pytest.mark.parametrize("guided", [False, True])
def test_estimates_of_several_steps_agree(objective: Objective, guided: bool) -> None:
    """Other directions and other contexts, the same gradient: its mean is no accident."""
    point = away(objective)
    estimator = SpreadSigns(2, directions=512, guided=guided)
    estimates = [estimator.gradient(objective, point, step) for step in range(4)]
    mean = np.mean(estimates, axis=0)
    central = CentralDifferences(4, directions=128).gradient(objective, point, 0)
    assert cosine(estimates[0] + estimates[1], estimates[2] + estimates[3]) > 0.5
    assert cosine(mean, central) > 0.5
    assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(central), rel=0.5)


def test_along_a_guide_the_slope_is_measured_and_not_drawn(demo_model: Path) -> None:
    with opened(demo_model) as engine, Workspace(engine) as workspace:
        one = Amounts(say=1, prefixes=0, implied=0, keep=2)
        objective, _ = objective_of(engine, workspace, QUICK, one)
        (guide,), (said,) = objective.guides, np.flatnonzero(objective.says)
        # At the start what is kept is flat, so all that is estimated is of the one context to be said.
        estimate = SpreadSigns(1, distance=0.1, guided=True).gradient(objective, objective.start, 0)
        distance = 0.1 * objective.scale
        ahead = objective.values((distance * guide[None]).astype(np.float32), np.array([said]))[0]
    slope = objective.weights[said] * (ahead - objective.start.values[said]) / distance
    assert float(estimate @ guide) == pytest.approx(slope, rel=0.02)


def test_a_gradient_is_the_same_again(objective: Objective) -> None:
    point = objective.start
    first, again, next_step = (SpreadSigns(5).gradient(objective, point, step) for step in (1, 1, 2))
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-5 * np.abs(first).max())
    assert cosine(first, next_step) < 0.99


def test_the_search_never_goes_uphill(endless: Objective) -> None:
    """Not even against a useless gradient."""
    state = search(endless, SpreadSigns(1), Budget(6))
    assert state.step == len(state.losses) == 6
    losses = [endless.start.loss, *state.losses]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    gradient = SpreadSigns(1).gradient(endless, state.point, 0)
    lengths = [state.length]
    for _ in range(3):
        made = line_search(endless, replace(state, momentum=-gradient), -gradient)
        assert made.point is state.point
        lengths.append(made.length)
        state = replace(made, momentum=state.momentum)
    assert lengths[1] < lengths[0]


def test_a_search_ends_when_all_is_said_with_a_margin(objective: Objective) -> None:
    state = search(objective, SpreadSigns(1), Budget(40))
    assert state.step < 20
    assert state.succeeded(objective)
    assert (state.point.margins[objective.says] > 1).all()
    found = objective.points(state.point.delta[None])[0]
    assert found.loss == pytest.approx(state.point.loss, rel=0.02)


def test_what_was_kept_must_still_lead(objective: Objective) -> None:
    point = objective.start
    ahead = np.where(objective.says, 2.0, 1.0)
    behind = np.where(objective.says, 2.0, -1.0)
    state = State.at(objective)
    assert not state.succeeded(objective)
    assert replace(state, point=replace(point, margins=ahead)).succeeded(objective)
    assert not replace(state, point=replace(point, margins=behind)).succeeded(objective)
    assert not replace(state, point=replace(point, margins=ahead / 2.5)).succeeded(objective)


def test_a_search_ends_where_nothing_is_gained(endless: Objective) -> None:
    state = State.at(endless)
    falling = tuple(10.0 * 0.9**step for step in range(13))
    assert not replace(state, losses=falling).stalled(12)
    assert not replace(state, losses=(5.0,) * 12).stalled(12)
    assert replace(state, losses=(5.0,) * 13).stalled(12)
    # A long change may cost less first; only where it costs next to nothing already the search ends.
    decay = endless.decay
    stalled = replace(state, losses=(5.0,) * 7, step=7)
    assert search(endless, SpreadSigns(1), Budget(8), state=stalled).step == 8
    assert endless.decay < decay
    while endless.allow_longer():
        pass
    assert search(endless, SpreadSigns(1), Budget(40), state=stalled) is stalled


def test_a_budget_ends_a_search(endless: Objective) -> None:
    assert search(endless, SpreadSigns(1), Budget(2)).step == 2
    assert search(endless, SpreadSigns(1), Budget(100, seconds=0.0)).step <= 1


def test_what_is_raised_after_a_step_ends_it(endless: Objective) -> None:
    seen: list[int] = []

    def after_step(state: State) -> None:
        seen.append(state.step)
        if state.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(endless, SpreadSigns(1), Budget(9), after_step=after_step)
    assert seen == [1, 2]


def test_plain_descent_looks_only_now_and_then(endless: Objective) -> None:
    rule = PlainDescent(rate=0.02, check=2)
    start = State.at(endless)
    gradient = CentralDifferences(1).gradient(endless, start.point, 0)
    first = rule(endless, start, gradient)
    np.testing.assert_allclose(first.point.delta, -0.02 * endless.scale**2 * gradient, rtol=1e-6, atol=1e-12)
    assert first.point.loss == start.point.loss
    second = rule(endless, replace(first, step=1), gradient)
    assert second.point.loss != start.point.loss


# --- going on ---------------------------------------------------------------------------------


def test_a_search_goes_on_where_it_was(endless: Objective) -> None:
    whole = search(endless, SpreadSigns(1), Budget(6))
    half = search(endless, SpreadSigns(1), Budget(3))
    content = to_bytes(Kept(spent=Spent(1.5, 300), searching=Spent(1.0, 200)).with_state(2, half))
    kept = from_bytes(content)
    assert (kept.spent, kept.searching) == (Spent(1.5, 300), Spent(1.0, 200))
    assert kept.state_of(1, endless) is None
    state = kept.state_of(2, endless)
    assert state is not None
    assert (state.step, state.length, state.losses) == (3, half.length, half.losses)
    np.testing.assert_array_equal(state.point.delta, half.point.delta)
    np.testing.assert_array_equal(state.momentum, half.momentum)
    assert state.point.loss == pytest.approx(half.point.loss, rel=0.02)
    steps: list[int] = []
    done = search(
        endless, SpreadSigns(1), Budget(6), state=state, after_step=lambda state: steps.append(state.step)
    )
    assert steps == [4, 5, 6]
    assert done.losses[:3] == half.losses
    # Its rows stand in another batch when the point is computed again, and differ in their last bits.
    assert done.point.loss == pytest.approx(whole.point.loss, rel=0.02)
    assert cosine(done.point.delta, whole.point.delta) > 0.99


def test_a_search_that_was_allowed_longer_changes_still_is(
    endless: Objective, endless_probes: Probes
) -> None:
    stalled = replace(State.at(endless), losses=(5.0,) * 20, step=20)
    state = search(endless, SpreadSigns(1), Budget(21), state=stalled)
    assert (state.longer, len(state.losses)) == (1, 1)
    assert endless.decay < Objective(endless_probes).decay
    kept = from_bytes(to_bytes(Kept().with_state(0, state)))
    again = Objective(endless_probes)
    found = kept.state_of(0, again)
    assert found is not None and found.longer == 1
    assert again.decay == endless.decay
    assert found.point.loss == pytest.approx(state.point.loss, rel=1e-3)


def test_a_state_of_another_model_is_as_none(endless: Objective) -> None:
    half = search(endless, SpreadSigns(1), Budget(1))
    other = replace(half, point=replace(half.point, delta=half.point.delta[:-1]))
    assert from_bytes(to_bytes(Kept().with_state(0, other))).state_of(0, endless) is None
    short = replace(half, momentum=half.momentum[:-1])
    assert from_bytes(to_bytes(Kept().with_state(0, short))).state_of(0, endless) is None


def test_what_cannot_be_read_is_as_if_nothing_had_been_kept(endless: Objective) -> None:
    sound = to_bytes(Kept().with_state(0, search(endless, SpreadSigns(1), Budget(1))))
    assert from_bytes(sound).searches
    draw = random.Random(0)
    damaged = [b"", b"PK", b"\x93NUMPY", sound[:100], sound[:-1], sound[:-30], sound[50:]]
    for _ in range(500):
        content = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        damaged.append(bytes(content))
    for content in damaged:
        state = from_bytes(content).state_of(0, endless)
        assert state is None or np.isfinite(state.point.delta).all()


@pytest.mark.parametrize(
    "meta", [[], 3, {}, {"searches": []}, {"searches": {"0": [1]}}, {"searches": {"0": [1, "x", 3]}}]
)
def test_descriptions_of_other_kinds_are_as_nothing(endless: Objective, meta: Any) -> None:
    if isinstance(meta, dict):
        meta |= {"seconds": 1.0, "rows": 1.0}
    arrays = {name: np.zeros(endless.probes.width) for name in ("delta.0", "momentum.0")}
    target = io.BytesIO()
    np.savez(target, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    assert from_bytes(target.getvalue()).searches == {}
