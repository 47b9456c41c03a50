"""The expected end of a wait for several answers that jitter and may have to be asked for again."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from scheduler.deadlines import BACKOFF

Floats = NDArray[np.float64]
# Points of the integral, for the bulk of the answers and for what was asked for again.
_POINTS = 24
_SPREAD = 4.0  # standard deviations beyond which nothing is expected
# Mean absolute deviation of a normal distribution, in standard deviations.
MEAN_DEVIATION = math.sqrt(2 / math.pi)
_STEP = np.linspace(0.0, 1.0, _POINTS)


def _normal_cdf(x: Floats) -> Floats:
    """Within 3e-4 (Page 1977); numpy has no error function."""
    cubic = x * (1.0 + 0.044715 * x * x)
    result: Floats = 0.5 * (1.0 + np.tanh(math.sqrt(2 / math.pi) * cubic))
    return result


def expected_end(
    start: float,
    answers: Floats,
    jitter: Floats,
    missing: Floats,
    missing_again: Floats,
    resend: Floats,
    latest: float = math.inf,
) -> float:
    """Mean of the time at which all answers are there, at least `start`.

    ``E[max] = low + integral of (1 - product of the answers' distribution functions)``. An answer comes at
    its mean time, normally spread; with chance `missing` it comes `resend` later, and with chance
    `missing_again` after that another `BACKOFF` times `resend` later.

    Args:
        start: seconds at which the waiting begins.
        answers: (n,) mean arrivals, seconds.
        jitter: (n,) standard deviations.
        missing: (n,) chance that an answer is not complete at the first try.
        missing_again: (n,) the same of a repeated one.
        resend: (n,) seconds from the first arrival to the one asked for again.
        latest: the waiting ends then in any case.
    """
    spread = _SPREAD * jitter
    matters = (answers + spread > start) | ((missing > 0) & (answers + 2.5 * resend + spread > start))
    if not matters.any():
        return start
    if not matters.all():
        answers, jitter, missing = answers[matters], jitter[matters], missing[matters]
        missing_again, resend, spread = missing_again[matters], resend[matters], spread[matters]
    latest = max(latest, start)
    if not missing.any() and not jitter.any():
        return min(max(start, float(answers.max())), latest)
    low = min(max(start, float((answers - spread).max())), latest)
    middle = min(max(low, float((answers + spread).max())), latest)
    grids = [low + (middle - low) * _STEP]
    if missing.any() and middle < latest:
        high = min(float((answers + (1 + BACKOFF) * resend + spread).max()), latest)
        grids.append(middle + (high - middle) * _STEP)
    deviation = np.maximum(jitter, 1e-6)[:, None]
    q, again, later = missing[:, None], missing_again[:, None], resend[:, None]
    total = low
    for grid in grids:
        x = grid[None, :] - answers[:, None]
        arrived = (1 - q) * _normal_cdf(x / deviation)
        if missing.any():
            arrived += q * (1 - again) * _normal_cdf((x - later) / deviation)
            arrived += q * again * _normal_cdf((x - (1 + BACKOFF) * later) / deviation)
        waiting = 1.0 - np.prod(arrived, axis=0)
        total += float((waiting[1:] + waiting[:-1]) @ np.diff(grid)) / 2
    return total


def expected_largest(count: int) -> float:
    """Mean of the largest of `count` standard normal values and one that is fixed at zero, about.

    Blom's approximation (1958) of normal order statistics, with half a value for the fixed one.
    """
    return NormalDist().inv_cdf((count + 0.125) / (count + 0.75)) if count else 0.0
