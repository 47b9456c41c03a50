"""Where a token's time goes: computing, waiting for others, and what the network takes of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAIN = 1 / 32  # of the running means


class StepTimes:
    """Running means for each layer, in seconds a token.

    Attributes:
        compute: attention and own groups.
        wait: until the layer's sync boundary let the token go on.
        transfers: from asking to the complete answer, the computing left out; 0 where nobody is asked.
        token: of a whole token.
        tokens, repeats: counts since the start.
    """

    def __init__(self, n_layers: int) -> None:
        self.compute: NDArray[np.float64] = np.zeros(n_layers)
        self.wait: NDArray[np.float64] = np.zeros(n_layers)
        self._transfer: NDArray[np.float64] = np.zeros(n_layers + 1)
        self.token = 0.0
        self.tokens = 0
        self.repeats = 0

    @property
    def transfers(self) -> NDArray[np.float64]:
        """See above."""
        return self._transfer[:-1]

    def layer(self, number: int, compute: float, wait: float) -> None:
        """A layer is done."""
        gain = _GAIN if self.tokens else 1.0
        self.compute[number] += gain * (compute - self.compute[number])
        self.wait[number] += gain * (wait - self.wait[number])

    def transfer(self, number: int, seconds: float) -> None:
        """A contribution is complete."""
        self._transfer[number] += _GAIN * (seconds - self._transfer[number])

    def end_token(self, seconds: float) -> None:
        """A token is done."""
        self.token += (_GAIN if self.tokens else 1.0) * (seconds - self.token)
        self.tokens += 1
