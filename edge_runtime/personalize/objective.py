"""What an edit's search makes small: the contexts' losses as one number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_runtime.personalize.probes import Losses, Probes

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

KEEP_WEIGHT = 2.0  # of all that must stay, beside 1 for all that is to be said; measured
_LONGER = 0.25  # of the decay, each time that a search finds no way within it
_LEAST_DECAY = 0.05
DECAY = 1.0  # of the squared length of the change, in units of the hidden state's; measured


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A change, and what it does.

    Attributes:
        delta: (n_embd,) added to the FFN's output at the subject.
        values: (n_contexts,) loss of each context: the likelihood's for what is to be said, the divergence
            for what is to be kept.
        margins: (n_contexts,) as in `Losses`.
        loss: of all together.
    """

    delta: Doubles
    values: Doubles
    margins: Doubles
    loss: float


class Objective:
    """The weighted losses of an edit's contexts, as a function of the change.

    Args:
        probes: whose readout is set.

    Attributes:
        weights: (n_contexts,) of each context's loss.
        says: (n_contexts,) whether a context is to be said.
        scale: typical length of a hidden state at the subject: the unit of changes.
    """

    def __init__(self, probes: Probes, keep_weight: float = KEEP_WEIGHT, decay: float = DECAY) -> None:
        self.probes = probes
        self.says = np.array([context.goal == "say" for context in probes.contexts])
        self.weights = np.zeros(len(self.says))
        for chosen, total in ((self.says, 1.0), (~self.says, keep_weight)):
            if chosen.any():
                self.weights[chosen] = total / chosen.sum()
        self.scale = probes.scale
        self.decay = decay / self.scale**2
        self.start = self.points(np.zeros((1, probes.width)))[0]

    @cached_property
    def guides(self) -> Doubles:
        """(number of contexts to be said, n_embd) directions of length 1 from the logit lens."""
        found: Doubles = self.probes.lens_directions()[self.says]
        return found

    def allow_longer(self) -> bool:
        """Let long changes cost less from now on; False where they cost next to nothing already."""
        if self.decay * self.scale**2 < _LEAST_DECAY:
            return False
        self.decay *= _LONGER
        return True

    def points(self, deltas: Doubles) -> list[Point]:
        """Each of `deltas` (n, n_embd) over all contexts."""
        found = self.probes.everywhere(deltas.astype(np.float32))
        values = self._chosen(found, np.arange(len(self.says)))
        losses = values @ self.weights + self.decay * (deltas**2).sum(axis=1)
        return [
            Point(delta, row, margins, float(loss))
            for delta, row, margins, loss in zip(deltas, values, found.margin, losses, strict=True)
        ]

    def values(self, deltas: Floats, contexts: NDArray[np.integer]) -> Doubles:
        """(n,) loss of context ``contexts[i]`` at ``deltas[i]``."""
        return self._chosen(self.probes.losses(deltas, contexts), contexts)

    def _chosen(self, found: Losses, contexts: NDArray[np.integer]) -> Doubles:
        chosen: Doubles = np.where(self.says[contexts], found.nll, found.divergence)
        return chosen
