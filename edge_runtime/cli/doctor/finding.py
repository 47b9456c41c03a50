"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, how bad it is, and what to do.

    Attributes:
        level: ``fault`` keeps the program from working or makes it several times slower; ``note`` may matter.
        advice: empty where there is nothing to do.
    """

    subject: str
    found: str
    level: Level = "ok"
    advice: str = ""
