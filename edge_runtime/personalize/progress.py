"""What an edit tells about itself while it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["preparing", "searching", "solving", "checking"]


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of an edit.

    Attributes:
        step: of the search; 0 before it.
        steps: at most so many.
        loss: the search's, in nats.
        probability: of the target after the prompt, the mean over its tokens, 0 .. 1.
        rows: tokens that went through the whole model so far.
        seconds: since the edit began, or went on.
    """

    stage: Stage
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    probability: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0


Report = Callable[[Progress], None]


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """Raised by who is told of the progress, to stop an edit between two steps."""
