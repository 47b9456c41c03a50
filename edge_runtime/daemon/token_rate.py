"""How many tokens came in each of the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 120  # seconds


class TokenRate:
    """Counts tokens by second.

    Args:
        clock: seconds, for tests.

    Attributes:
        last: when the last token came, counted or not, by the clock; minus infinity before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque(maxlen=WINDOW + 2)  # (second, tokens)
        self.last = float("-inf")

    def add(self, count: int) -> None:
        """So many tokens came just now."""
        self.last = self._clock()
        second = int(self.last)
        if self._seconds and self._seconds[-1][0] == second:
            count += self._seconds.pop()[1]
        self._seconds.append((second, count))

    def touch(self) -> None:
        """A token came that nobody asked for."""
        self.last = self._clock()

    def history(self) -> tuple[int, ...]:
        """Tokens in each of the last 120 whole seconds, oldest first."""
        now = int(self._clock())
        counts = dict(self._seconds)
        return tuple(counts.get(second, 0) for second in range(now - WINDOW, now))
