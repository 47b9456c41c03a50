"""The lab's link model by itself: what becomes of each packet, without any network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.netlab_links import LOST, QUEUE_FULL, SILENT, Direction, GilbertElliott, LinkModel

models = st.builds(
    LinkModel,
    delay=st.floats(0.01, 0.1),
    jitter=st.floats(0.0, 0.01),
    loss=st.sampled_from([0.0, 0.05, 0.5]),
    bursts=st.none() | st.builds(GilbertElliott, st.floats(0.01, 1.0), st.floats(0.01, 1.0)),
    bytes_per_second=st.none() | st.floats(1e4, 1e7),
    queue_bytes=st.integers(2000, 100_000),
    duplicate=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 5),
)
arrivals = st.lists(st.tuples(st.floats(0.0, 0.01), st.integers(20, 1500)), max_size=60)


def fates(model: LinkModel, packets: int, size: int = 1000, interval: float = 0.001) -> list[float]:
    direction = Direction(model, "a", "b", 0.0)
    return [direction.arrive(number * interval, size) for number in range(packets)]


@given(models, arrivals)
def test_packets_keep_their_order_and_none_comes_early(
    model: LinkModel, packets: list[tuple[float, int]]
) -> None:
    direction = Direction(model, "a", "b", 0.0)
    now = latest = 0.0
    for pause, size in packets:
        now += pause
        due = direction.arrive(now, size)
        if due >= 0.0:
            assert due >= now + model.delay - model.jitter - 1e-12
            assert due >= latest
            latest = due


@given(models, arrivals)
def test_the_same_seed_gives_the_same_fates(model: LinkModel, packets: list[tuple[float, int]]) -> None:
    first, second = (Direction(model, "a", "b", 0.0) for _ in range(2))
    now = 0.0
    for pause, size in packets:
        now += pause
        assert first.arrive(now, size) == second.arrive(now, size)
        assert first.copies == second.copies


@given(st.floats(1e4, 1e6), st.integers(2000, 50_000), arrivals)
def test_a_bottleneck_never_passes_more_than_its_rate(
    rate: float, room: int, packets: list[tuple[float, int]]
) -> None:
    direction = Direction(LinkModel(bytes_per_second=rate, queue_bytes=room), "a", "b", 0.0)
    now, passed = 0.0, []
    for pause, size in packets:
        now += pause
        due = direction.arrive(now, size)
        assert due in (QUEUE_FULL, due if due >= now else None)
        if due >= 0.0:
            assert (due - now) * rate <= room + 1.0
            passed.append((due, size))
    for (start, _), (end, size) in itertools.pairwise(passed):
        assert end - start >= size / rate * (1.0 - 1e-9)


def test_each_direction_has_decisions_of_its_own() -> None:
    model = LinkModel(loss=0.5)
    there, back = Direction(model, "a", "b", 0.0), Direction(model, "b", "a", 0.0)
    decisions = [(there.arrive(0.0, 100), back.arrive(0.0, 100)) for _ in range(64)]
    assert any(a != b for a, b in decisions)


def test_loss_does_not_hang_on_jitter() -> None:
    still = fates(LinkModel(delay=0.1, loss=0.2), 500)
    shaken = fates(LinkModel(delay=0.1, jitter=0.05, loss=0.2), 500)
    assert [due == LOST for due in still] == [due == LOST for due in shaken]


@pytest.mark.parametrize("loss", [0.01, 0.05, 0.3])
def test_independent_loss_lies_within_binomial_bounds(loss: float) -> None:
    packets = 20_000
    lost = fates(LinkModel(loss=loss, seed=3), packets).count(LOST)
    assert abs(lost - packets * loss) < 4.0 * math.sqrt(packets * loss * (1.0 - loss))


def test_bursts_have_the_mean_length_and_the_share_of_the_chain() -> None:
    bursts = GilbertElliott(to_bad=0.02, to_good=0.25)
    lost = [due == LOST for due in fates(LinkModel(bursts=bursts, seed=1), 50_000)]
    lengths = [len(list(group)) for is_lost, group in itertools.groupby(lost) if is_lost]
    # About 920 bursts of mean 4 and standard deviation 3.5: five standard errors are 0.6.
    assert sum(lengths) / len(lengths) == pytest.approx(4.0, abs=0.6)
    assert sum(lost) / len(lost) == pytest.approx(bursts.mean_loss, rel=0.2)


def test_held_back_packets_are_overtaken_and_the_others_stay_in_order() -> None:
    model = LinkModel(delay=0.01, reorder=0.1, reorder_delay=0.005, seed=2)
    due = fates(model, 1000)
    held = [number for number, time in enumerate(due) if time > number * 0.001 + 0.0149]
    rest = [time for number, time in enumerate(due) if number not in held]
    assert 60 < len(held) < 150  # 100 expected, five standard deviations are 47
    assert rest == sorted(rest)
    assert all(due[number] > due[number + 1] for number in held if number + 1 not in held and number < 999)


def test_an_outage_is_the_last_part_of_each_period() -> None:
    due = fates(LinkModel(outage_every=0.1, outage_seconds=0.025), 400)
    silent = [number for number, time in enumerate(due) if time == SILENT]
    expected = [number for number in range(400) if number % 100 >= 75]
    # Multiples of a millisecond are not exact: the very edges may fall on either side.
    assert set(silent) ^ set(expected) <= {
        edge for period in range(5) for edge in (period * 100, period * 100 + 75)
    }


def test_a_link_that_is_down_passes_nothing() -> None:
    assert set(fates(LinkModel(delay=0.1, down=True), 10)) == {SILENT}


def test_a_new_model_does_not_let_packets_overtake_those_under_way() -> None:
    direction = Direction(LinkModel(delay=0.5), "a", "b", 0.0)
    slow = direction.arrive(0.0, 100)
    direction.replace(LinkModel(), "a", "b", 0.0)
    assert direction.arrive(0.1, 100) == slow
    assert direction.arrive(0.6, 100) == 0.6


@given(models)
def test_a_model_survives_its_json_form(model: LinkModel) -> None:
    assert LinkModel.from_json(model.as_json()) == model


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": 1.1},
        {"loss": math.nan},
        {"delay": -0.001},
        {"delay": 0.001, "jitter": 0.002},
        {"bytes_per_second": 0.0},
        {"queue_bytes": 0},
        {"reorder": 0.1},
        {"outage_every": 1.0, "outage_seconds": 2.0},
        {"bursts": {"to_bad": 0.0, "to_good": 0.0}},
    ],
)
def test_an_impossible_link_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        if "bursts" in fields:
            GilbertElliott(**fields["bursts"])
        LinkModel(**fields)
