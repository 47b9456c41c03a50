"""What planning raises."""

from __future__ import annotations


class SchedulingError(ValueError):
    """No plan is possible, or a profile contradicts itself.

    The message says what was found, what was needed and what to do.
    """
