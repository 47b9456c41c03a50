"""Sync sets, the quality they keep, and what a request has paid."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scheduler.datagrams import copies_for, incomplete
from scheduler.errors import SchedulingError
from scheduler.patience import HEAD_ROOM, Meter, Response, Rung, allowance, ladder, lateness

NAN = float("nan")
# Measured on a small trained model: single layers late by 1..5, and sync sets as a whole.
LATE = (
    np.array(
        [
            [4.56, 8.1, 12.7, 22.4, 49.4],
            [0.20, 0.33, 0.46, 0.73, NAN],
            [0.11, 0.23, 0.40, NAN, NAN],
            [0.20, 0.46, NAN, NAN, NAN],
            [1.45, NAN, NAN, NAN, NAN],
            [NAN] * 5,
        ]
    )
    * 1e-3
)
LOST = np.array([61, 0.99, 0.58, 0.94, 2.37, 261]) * 1e-3
SHARES = (0.25, 0.5, 0.75, 1.0)
RUNGS = (
    Rung((1, 2, 3, 4, 5, 6), SHARES, (0.0, 0.0, 0.0, 0.0)),
    Rung((1, 2, 4, 5, 6), SHARES, (0.0, 1e-4, 1.1e-3, 2.2e-3)),
    Rung((1, 3, 5, 6), SHARES, (0.0, 4e-4, 2.5e-3, 3.6e-3)),
    Rung((1, 5, 6), SHARES, (3e-4, 9e-4, 1.42e-2, 5.3e-2)),
    Rung((1, 6), SHARES, (7e-4, 5e-3, 6.6e-2, 0.24)),
    Rung((6,), SHARES, (0.0117, 0.0853, 0.79, 3.8)),
)
RESPONSE = Response(6, LATE, LOST, RUNGS)


def cost(late_cost: np.ndarray[tuple[int, int], np.dtype[np.float64]], syncs: tuple[int, ...]) -> float:
    total = 0.0
    for layer, late in enumerate(lateness(syncs, len(late_cost))):
        if late > late_cost.shape[1]:
            return math.inf
        total += late_cost[layer, late - 1] if late else 0.0
    return total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ladder_is_as_good_as_trying_every_set(data: st.DataObject) -> None:
    n_layers = data.draw(st.integers(1, 7))
    depth = data.draw(st.integers(1, 5))
    late_cost = data.draw(arrays.arrays(np.float64, (n_layers, depth), elements=st.floats(0, 1)))
    found = {len(syncs): syncs for syncs in ladder(late_cost, n_layers)}
    for number in range(1, n_layers + 1):
        best = min(
            cost(late_cost, (*chosen, n_layers))
            for chosen in itertools.combinations(range(1, n_layers), number - 1)
        )
        if math.isinf(best):
            assert number not in found
        else:
            assert cost(late_cost, found[number]) == pytest.approx(best, abs=1e-9)


def test_ladder_waits_for_the_layers_that_cost_most() -> None:
    assert ladder(LATE, 6) == [rung.syncs for rung in RUNGS]


def test_lateness_counts_layers_up_to_the_next_sync() -> None:
    assert lateness((1, 4, 6), 6) == [0, 2, 1, 0, 1, 0]
    for wrong in ((), (2, 1, 6), (1, 5), (0, 6)):
        with pytest.raises(SchedulingError, match="sync boundaries"):
            lateness(wrong, 6)


@pytest.mark.parametrize(
    ("share", "quality", "number"),
    [(0.5, 0.99, 2), (0.75, 0.99, 4), (1.0, 0.99, 4), (0.25, 0.99, 2), (0.5, 0.999, 4), (1.0, 0.9, 3)],
)
def test_fewest_syncs_that_keep_the_quality(share: float, quality: float, number: int) -> None:
    syncs = RESPONSE.syncs_for(share, 0.0, quality)
    assert len(syncs) == number
    assert RESPONSE.predicted(syncs, share) <= HEAD_ROOM * -math.log(quality) + 1e-12


def test_expected_losses_take_from_the_allowance() -> None:
    numbers = [len(RESPONSE.syncs_for(0.5, loss, 0.99)) for loss in (0.0, 0.01, 0.02, 0.1)]
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1] == 6


def test_measurement_that_came_out_well_by_chance_is_not_trusted() -> None:
    lucky = Response(6, LATE, LOST, (*RUNGS[:4], Rung((1, 6), SHARES, (0, 0, 0, 0)), RUNGS[5]))
    assert len(lucky.syncs_for(1.0, 0.0, 0.99)) == 4


def test_share_that_was_not_measured_waits_for_everything() -> None:
    narrow = Response(6, LATE, LOST, (Rung((1, 6), (0.25, 0.5), (0.0, 0.0)),))
    assert narrow.syncs_for(0.6, 0.0, 0.9) == (1, 2, 3, 4, 5, 6)


def test_increase_goes_through_what_was_measured() -> None:
    for rung in RUNGS:
        for share, increase in zip(rung.shares, rung.increases, strict=True):
            assert RESPONSE.predicted(rung.syncs, share) == pytest.approx(increase, abs=1e-12)


def test_nothing_late_costs_nothing() -> None:
    assert RESPONSE.late_increase([0] * 6, [1.0] * 6) == 0
    assert RESPONSE.late_increase([5, 4, 3, 2, 1, 0], [0.0] * 6) == 0


@pytest.mark.parametrize("n_layers", [1, 2, 6, 22, 80])
def test_resampled_costs_the_same_altogether(n_layers: int) -> None:
    other = RESPONSE.resampled(n_layers)
    assert other.n_layers == n_layers
    assert np.isfinite(other.lost_cost).all()
    assert float(other.lost_cost.sum()) == pytest.approx(float(LOST.sum()))
    for rung in other.rungs:
        assert rung.syncs[-1] == n_layers and list(rung.increases) == sorted(rung.increases)
    assert (1 if n_layers == 1 else n_layers) in {len(rung.syncs) for rung in other.rungs}


def test_resampled_to_its_own_depth_is_itself() -> None:
    assert RESPONSE.resampled(6) is RESPONSE


def test_deeper_model_needs_no_more_relative_patience() -> None:
    syncs = RESPONSE.resampled(22).syncs_for(0.5, 0.0, 0.99)
    assert len(syncs) < 12


def test_response_of_wrong_shape_is_refused() -> None:
    with pytest.raises(SchedulingError, match="late costs"):
        Response(5, LATE, LOST, ())
    with pytest.raises(SchedulingError, match="lost costs"):
        Response(6, LATE, LOST[:5], ())
    with pytest.raises(SchedulingError, match="sync boundaries"):
        Response(6, LATE, LOST, (Rung((1, 5), SHARES, (0, 0, 0, 0)),))
    with pytest.raises(SchedulingError, match="rung of 2 syncs"):
        Response(6, LATE, LOST, (Rung((1, 6), SHARES, (0, 0, 0)),))
    with pytest.raises(SchedulingError, match="quality"):
        allowance(1.5)


# --- what a request has paid --------------------------------------------------------------------


def test_meter_agrees_with_the_prediction_where_all_happens_as_planned() -> None:
    syncs, shares = (1, 6), [0.5] * 6
    meter = Meter(RESPONSE, 0.99, syncs, shares)
    for _ in range(20):
        for layer, by in enumerate(lateness(syncs, 6)):
            if by:
                meter.late(layer, 0.25, by)  # two workers hold a half of the half each
                meter.late(layer, 0.25, by)
        meter.end_token()
    assert meter.mean == pytest.approx(RESPONSE.predicted(syncs, 0.5))
    assert not meter.exceeded


def test_meter_waits_for_a_few_tokens_before_it_judges() -> None:
    meter = Meter(RESPONSE, 0.99, (1, 6), [0.5] * 6)
    for token in range(1, 30):
        meter.late(0, 0.5, 5)
        meter.end_token()
        assert meter.exceeded == (token >= 16)


def test_losses_of_the_last_layer_exceed_the_bound() -> None:
    meter = Meter(RESPONSE, 0.99, (1, 6), [0.5] * 6, minimum_tokens=1)
    meter.lost(5, 0.5)
    meter.end_token()
    assert meter.mean == pytest.approx(LOST[5]) and meter.exceeded


def test_later_than_measured_counts_as_lost() -> None:
    late, lost = (Meter(RESPONSE, 0.99, (1, 6), [0.5] * 6) for _ in range(2))
    late.late(0, 0.1, 9)
    lost.lost(0, 0.1)
    late.end_token()
    lost.end_token()
    assert late.mean == lost.mean > 0


def test_layers_that_are_all_remote_cost_more_when_late() -> None:
    half, whole = (Meter(RESPONSE, 0.99, (1, 5, 6), [0.5, 0.5, share, 0.5, 0.5, 0.5]) for share in (0.5, 1.0))
    half.late(2, 0.5, 1)
    whole.late(2, 1.0, 1)
    half.end_token()
    whole.end_token()
    assert whole.mean > 5 * half.mean


def test_late_events_of_one_contribution_add_up_by_share() -> None:
    whole, parts = (Meter(RESPONSE, 0.99, (1, 6), [0.5] * 6) for _ in range(2))
    whole.late(2, 0.5, 3)
    for _ in range(4):
        parts.late(2, 0.125, 3)
    whole.end_token()
    parts.end_token()
    assert whole.mean == pytest.approx(parts.mean)


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "copies"), [(0.0, 1), (0.01, 2), (0.02, 2), (0.05, 3), (0.1, 3)])
def test_copies_keep_exchanges_complete(loss: float, copies: int) -> None:
    assert copies_for(loss, 9) == copies
    assert incomplete(loss, 9, copies) <= 0.02


def test_copies_have_a_limit() -> None:
    assert copies_for(0.5, 9) == 3
