"""The search for what is to be added at the subject: downhill along an estimated gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.personalize.estimators import Estimator
from edge_runtime.personalize.objective import Objective, Point

Doubles = NDArray[np.float64]

MARGIN = 1.0  # logits by which each token of what is to be said must lead
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the last step's length, tried at once
_MOMENTUM = 0.5
_FIRST_STEP = 0.25  # of the objective's scale
_LEAST_STEP = 0.01
_MULTIPLES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of a change that would do
_SHORTER = 0.25  # of the step, where none of the factors helped
_STALLED_GAIN = 0.1  # of the loss
_MAY_LOSE = 0.1  # of what was to be kept; waiting for the last one doubles the rows, measured


@dataclass(frozen=True, slots=True)
class Budget:
    """When a search ends that has not succeeded.

    Attributes:
        steps, seconds: at most so many.
        patience: steps that together gain next to nothing.
    """

    steps: int = 60
    seconds: float = float("inf")
    patience: int = 6


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A search between two steps; all that going on needs.

    Attributes:
        point: the best so far.
        step: how many were made.
        momentum: (n_embd,) the running mean of the gradients.
        length: of the last step.
        losses: after each step, since longer changes were allowed.
        longer: how often they were.
    """

    point: Point
    step: int
    momentum: Doubles
    length: float
    losses: tuple[float, ...] = field(default=())
    longer: int = 0

    @classmethod
    def at(cls, objective: Objective, point: Point | None = None) -> State:
        """Before the first step."""
        start = objective.start if point is None else point
        return cls(start, 0, np.zeros_like(start.delta), _FIRST_STEP * objective.scale)

    def succeeded(self, objective: Objective) -> bool:
        """Whether all that is to be said leads by the margin, and nearly all that was kept still leads."""
        says, start = objective.says, objective.start
        kept = self.point.margins[~says & (start.margins > 0)]
        lost = np.count_nonzero(kept <= 0)
        return bool(self.point.margins[says].min() > MARGIN and lost <= _MAY_LOSE * len(kept))

    def stalled(self, patience: int) -> bool:
        """Whether so many of the last steps have gained next to nothing."""
        before = self.losses[-patience - 1 : -patience]
        return bool(before) and self.losses[-1] > (1 - _STALLED_GAIN) * before[0]


class Rule(Protocol):
    """Makes a step out of a gradient."""

    def __call__(self, objective: Objective, state: State, gradient: Doubles, /) -> State: ...


def line_search(objective: Objective, state: State, gradient: Doubles) -> State:
    """With momentum, as far as is best of five lengths around the last one's; never uphill."""
    momentum = _MOMENTUM * state.momentum + (1 - _MOMENTUM) * gradient
    downhill = -momentum / max(float(np.linalg.norm(momentum)), 1e-30)
    lengths = state.length * np.array(_FACTORS)
    points = objective.points(state.point.delta + lengths[:, None] * downhill)
    best = min(range(len(points)), key=lambda index: points[index].loss)
    least = _LEAST_STEP * objective.scale
    if points[best].loss < state.point.loss:
        return replace(state, point=points[best], momentum=momentum, length=max(float(lengths[best]), least))
    return replace(state, momentum=momentum, length=max(_SHORTER * state.length, least))


@dataclass(frozen=True, slots=True)
class PlainDescent:
    """Gradient descent with a fixed rate, as MobiEdit's; looks at the loss only every so many steps.

    Attributes:
        rate: length of a step for a gradient of 1, in units of the objective's scale.
        check: steps between two looks.
    """

    rate: float
    check: int = 20

    def __call__(self, objective: Objective, state: State, gradient: Doubles) -> State:
        """As `Rule`."""
        delta = state.point.delta - self.rate * objective.scale**2 * gradient
        if (state.step + 1) % self.check == 0:
            return replace(state, point=objective.points(delta[None])[0])
        return replace(state, point=replace(state.point, delta=delta))


def search(
    objective: Objective,
    estimator: Estimator,
    budget: Budget,
    *,
    rule: Rule = line_search,
    state: State | None = None,
    after_step: Callable[[State], None] = lambda state: None,
) -> State:
    """Go downhill until all is said with a margin, nothing is gained any more, or the budget is spent.

    Args:
        state: where an interrupted search goes on.
        after_step: told after each step; what it raises ends the search.
    """
    state = state or State.at(objective)
    end = time.monotonic() + budget.seconds
    while state.step < budget.steps and time.monotonic() < end and not state.succeeded(objective):
        if state.stalled(budget.patience):
            if not objective.allow_longer():
                break
            # The loss of the point is another now, and so are the gains of the steps to come.
            again = objective.points(state.point.delta[None])[0]
            state = replace(state, point=again, losses=(), longer=state.longer + 1)
        gradient = estimator.gradient(objective, state.point, state.step)
        state = rule(objective, state, gradient)
        state = replace(state, step=state.step + 1, losses=(*state.losses, state.point.loss))
        after_step(state)
    return _shortest(objective, state) if state.succeeded(objective) else state


def _shortest(objective: Objective, state: State) -> State:
    """With the shortest multiple of the change that still succeeds: the last step often went too far."""
    points = objective.points(np.array(_MULTIPLES)[:, None] * state.point.delta)
    shorter = (replace(state, point=point) for point in points)
    return next((found for found in shorter if found.succeeded(objective)), state)
