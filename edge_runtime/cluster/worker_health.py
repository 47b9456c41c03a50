"""Which workers are asked, and which are left alone for a while."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Seconds that a worker is left alone after a failure; each further failure makes it four times as long, so
# that a worker that comes and goes costs a generation little, whatever its rhythm.
_FIRST_PAUSE = 1.0
_PAUSE_GROWTH = 4.0
_LONGEST_PAUSE = 120.0
# After so many seconds without failure a worker's past is forgotten.
_FORGIVEN_SECONDS = 60.0
_PING_SECONDS = 0.1


@dataclass(slots=True)
class WorkerHealth:
    """One worker's. Times are of a monotonic clock, in seconds.

    Attributes:
        failures: how often it did not answer in time.
        expelled: why it is not asked any more; empty where it is.
        verified: its answers were compared with ones computed here since it came or came back.
        paused_until: it is left alone until then, and until it gives a sign of life.
    """

    failures: int = 0
    expelled: str = ""
    verified: bool = False
    pause: float = _FIRST_PAUSE
    failed_at: float = -math.inf
    paused_until: float = -math.inf
    pinged_at: float = -math.inf

    @property
    def is_paused(self) -> bool:
        """Whether it is left alone after a failure."""
        return self.paused_until > -math.inf

    def is_asked(self, now: float, seen: float) -> bool:
        """Whether the worker gets requests; `seen` is when it last gave a sign of life."""
        if self.expelled:
            return False
        if self.is_paused and now >= self.paused_until and seen > self.failed_at:
            self.paused_until = -math.inf
        return not self.is_paused

    def is_missed(self, now: float, seen: float) -> bool:
        """Whether it was to come back by now, and gave no sign of life."""
        return self.is_paused and now >= self.paused_until and seen <= self.failed_at

    def fail(self, now: float) -> None:
        """It did not answer in time."""
        if now - self.failed_at > _FORGIVEN_SECONDS:
            self.pause = _FIRST_PAUSE
        self.failures += 1
        self.failed_at = now
        self.paused_until = now + self.pause
        self.pause = min(self.pause * _PAUSE_GROWTH, _LONGEST_PAUSE)
        self.verified = False

    def expel(self, reason: str) -> None:
        """It answered wrongly: nothing of it is trusted any more."""
        self.expelled = self.expelled or reason

    def wants_ping(self, now: float) -> bool:
        """Whether it is time to look for a sign of life of a paused worker."""
        if self.expelled or not self.is_paused or now - self.pinged_at < _PING_SECONDS:
            return False
        self.pinged_at = now
        return True
