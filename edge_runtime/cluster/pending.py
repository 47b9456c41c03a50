"""A contribution that has been asked for, and what of it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

ALL_FRAGMENTS = -1  # as long as it is unknown how many there are


@dataclass(slots=True, eq=False)
class Pending:
    """One contribution of one worker that is not complete.

    Attributes:
        target: flat vector that its values are added to.
        inputs: (n_rows, n_embd) what it is computed from.
        values: (n_rows, width) side values, where adapters change the layer.
        asked: when, seconds of a monotonic clock.
        resend: when to ask again.
        share: its part of the layer's groups.
        fill: what stands for it in `target` until it comes; None for nothing.
        checked: it is collected apart and compared with one computed here before it reaches the target.
        attempts: requests so far, less one.
        missing: bit mask of the fragments that are not there.
        arrived: (first, length) of those that are.
    """

    layer: int
    worker: int
    target: Floats
    inputs: Floats
    asked: float
    resend: float
    share: float
    fill: Floats | None = None
    checked: bool = False
    values: Floats | None = None
    attempts: int = 0
    missing: int = ALL_FRAGMENTS
    arrived: list[tuple[int, int]] = field(default_factory=list)
    apart: Floats | None = None

    def __post_init__(self) -> None:
        if self.fill is not None:
            self.target += self.fill
        if self.checked:
            self.apart = np.zeros_like(self.target)

    def fold(self, first: int, values: Floats, fragment: int, n_fragments: int) -> bool:
        """Add one fragment's values; False if it was there already or does not fit."""
        bit = 1 << fragment
        last = first + len(values)
        if self.missing == ALL_FRAGMENTS:
            self.missing = (1 << n_fragments) - 1
        if not self.missing & bit or last > self.target.size:
            return False
        self.missing &= ~bit
        self.arrived.append((first, len(values)))
        if self.apart is not None:
            self.apart[first:last] = values
            return True
        self.target[first:last] += values
        if self.fill is not None:
            self.target[first:last] -= self.fill[first:last]
        return True

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.missing == 0

    @property
    def part_missing(self) -> float:
        """How much of it is not there, 0 to 1."""
        return 1.0 - sum(length for _, length in self.arrived) / self.target.size

    def each_missing(self, tell: Callable[[int, int, int, int, int], object]) -> None:
        """Tell (layer, worker, fragment, fragments, -1) for each fragment that is not there."""
        if self.missing == ALL_FRAGMENTS:
            tell(self.layer, self.worker, -1, 0, -1)
            return
        n_fragments = len(self.arrived) + self.missing.bit_count()
        for fragment in range(n_fragments):
            if self.missing >> fragment & 1:
                tell(self.layer, self.worker, fragment, n_fragments, -1)

    def complete_with(self, computed: Floats) -> None:
        """Add what did not arrive, from the whole contribution (n_rows, width) computed here."""
        rest = computed.reshape(-1).copy()
        if self.fill is not None:
            rest -= self.fill
        if self.apart is None:
            for first, length in self.arrived:
                rest[first : first + length] = 0
        self.target += rest
        self.missing = 0

    def settle(self) -> None:
        """Let what was collected apart reach the target, as far as it is there."""
        if self.apart is None:
            return
        for first, length in self.arrived:
            part = slice(first, first + length)
            self.target[part] += self.apart[part]
            if self.fill is not None:
                self.target[part] -= self.fill[part]
