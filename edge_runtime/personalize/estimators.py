"""Which way the loss falls, found by forward passes alone, or by back-propagation to compare with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.personalize.objective import Objective, Point
from edge_runtime.personalize.signs import signs

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_LEAST_STEEPNESS = 0.05  # of a context with next to nothing to gain: it is still looked at


class Estimator(Protocol):
    """Estimates the gradient of an objective."""

    def gradient(self, objective: Objective, point: Point, step: int) -> Doubles:
        """(n_embd,) at `point`, in the search's step number `step`, from 0."""


class SpreadSigns:
    """Finite differences along random signs, each on one context only.

    A direction's difference on one context costs as many rows as that context; averaged over all of them it
    would cost all. What limits the estimate is the number of directions, so each gets a context of its own,
    the more of them the more of the loss a context still has. One side is enough: the loss at the point
    itself is known from the step before, and with random signs the curvature adds noise and no bias.

    Args:
        directions: a step.
        distance: of a probe from the point, in units of the objective's scale.
        antithetic: measure both sides, with half as many directions.
        guided: also measure each context that is to be said along what the logit lens says of it. It costs
            3 % more rows and gained nothing on the demo model, at no layer.
    """

    def __init__(
        self,
        seed: int,
        directions: int = 256,
        distance: float = 0.1,
        *,
        antithetic: bool = False,
        guided: bool = False,
    ) -> None:
        self._seed = seed
        self._directions = directions // 2 if antithetic else directions
        self._distance = distance
        self._antithetic = antithetic
        self._guided = guided

    def gradient(self, objective: Objective, point: Point, step: int) -> Doubles:
        """As `Estimator.gradient`."""
        width = len(point.delta)
        contexts = self._assigned(objective, point, step)
        # Columns of length one: a direction's square sums to 1.
        directions = signs(self._seed, step, self._directions, width) / np.sqrt(np.float32(width))
        shares = width * objective.weights[contexts] / np.bincount(contexts)[contexts]
        if self._guided:
            estimate = self._with_guides(objective, point, directions, contexts, shares)
        else:
            slopes = self._slopes(objective, point, directions, contexts)
            estimate = (shares * slopes).astype(np.float32) @ directions
        return estimate + 2 * objective.decay * point.delta

    def _slopes(
        self, objective: Objective, point: Point, directions: Floats, contexts: NDArray[np.int64]
    ) -> Doubles:
        """(n,) of each direction on its context."""
        distance = np.float32(self._distance * objective.scale)
        here = point.delta.astype(np.float32)
        ahead = objective.values(here + distance * directions, contexts)
        if self._antithetic:
            behind = objective.values(here - distance * directions, contexts)
            slopes: Doubles = (ahead - behind) / (2 * distance)
        else:
            slopes = (ahead - point.values[contexts]) / distance
        return slopes

    def _with_guides(
        self,
        objective: Objective,
        point: Point,
        directions: Floats,
        contexts: NDArray[np.int64],
        shares: Doubles,
    ) -> Doubles:
        """The estimate with each said context's slope along its guide known, and not drawn by lot."""
        said = np.flatnonzero(objective.says)
        guides = objective.guides
        slopes = self._slopes(
            objective,
            point,
            np.concatenate([directions, guides], dtype=np.float32),
            np.concatenate([contexts, said]),
        )
        random = shares * slopes[: len(directions)]
        along = np.zeros((len(objective.says), directions.shape[1]))
        along[said] = guides
        drawn = np.bincount(contexts, random * (directions * along[contexts]).sum(axis=1), len(along))
        known = objective.weights[said] * slopes[len(directions) :]
        estimate: Doubles = random @ directions + (known - drawn[said]) @ guides
        return estimate

    def _assigned(self, objective: Objective, point: Point, step: int) -> NDArray[np.int64]:
        """A context for each direction: the steeper it is likely to be and the cheaper, the more often."""
        values = np.maximum(point.values, 0)
        # The likelihood's gradient falls with what is left to gain, a divergence's with its square root.
        steepness = np.where(objective.says, 1 - np.exp(-values), np.sqrt(values))
        wanted = objective.weights * (steepness + _LEAST_STEEPNESS) / np.sqrt(objective.probes.n_rows)
        if not point.delta.any():
            wanted[~objective.says] = 0  # a divergence from itself is flat
        ideal = self._directions * wanted / wanted.sum()
        counts = np.floor(ideal).astype(np.int64)
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 1, step]))
        rest = generator.choice(len(wanted), self._directions - counts.sum(), p=wanted / wanted.sum())
        return generator.permutation(np.concatenate([np.repeat(np.arange(len(wanted)), counts), rest]))


class CentralDifferences:
    """MobiEdit's estimator [2506.13772]: Gaussian directions, central differences, every context each time.

    Args:
        directions: a step; each costs two passes over all contexts.
        distance: of a probe from the point, in units of the objective's scale.
    """

    def __init__(self, seed: int, directions: int = 8, distance: float = 0.1) -> None:
        self._seed = seed
        self._directions = directions
        self._distance = distance

    def gradient(self, objective: Objective, point: Point, step: int) -> Doubles:
        """As `Estimator.gradient`."""
        generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 2, step]))
        width = len(point.delta)
        directions = generator.standard_normal((self._directions, width))
        distance = self._distance * objective.scale / np.sqrt(width)
        both = np.concatenate([point.delta + distance * directions, point.delta - distance * directions])
        losses = np.array([found.loss for found in objective.points(both)])
        slopes = (losses[: self._directions] - losses[self._directions :]) / (2 * distance)
        estimate: Doubles = slopes @ directions / self._directions
        return estimate
