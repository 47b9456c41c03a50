"""Times, parts and states of a cluster as people read them."""

from __future__ import annotations

import click

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""Of the devices of a model, in their order; they begin anew where there are more."""

STATES = {
    "here": "this device",
    "works": "works",
    "idle": "idle",
    "paused": "paused",
    "expelled": "expelled",
    "gone": "gone",
}
STATE_COLOURS = {"here": "green", "works": "green", "paused": "yellow", "expelled": "red", "gone": "red"}

_BLOCKS = " ▏▎▍▌▋▊▉█"


def plain(text: str) -> str:
    """A text of another device: without anything that could command the terminal."""
    return "".join(character for character in text if character.isprintable())


def milliseconds(seconds: float) -> str:
    """0.04 ms, 2.31 ms, 38.0 ms, 1.20 s."""
    value = seconds * 1000
    if value >= 1000:
        return f"{seconds:.2f} s"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"


def percent(part: float) -> str:
    """58 %, 0.4 %, 0 %."""
    value = part * 100
    return f"{value:.1f} %" if 0 < value < 1 else f"{value:.0f} %"


def count(number: float) -> str:
    """Thousands apart; parts of contributions are no whole numbers, and nobody wants to know."""
    return f"{number:,.0f}"


def times(number: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def listed(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def bar(part: float, width: int, colour: str | None = None) -> str:
    """A bar as long as a part (0 to 1) of a width, in eighths of a character, filled up with spaces."""
    eighths = round(min(max(part, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    drawn = _BLOCKS[-1] * whole + (_BLOCKS[rest] if rest else "")
    return click.style(drawn, fg=colour) + " " * (width - len(drawn))


def stacked(parts: list[float], width: int, colours: tuple[str, ...], marks: str) -> str:
    """Parts of a whole (their sum at most 1) one after the other, each with its mark and colour."""
    drawn, used, reached = "", 0, 0.0
    for part, colour, mark in zip(parts, colours, marks, strict=True):
        reached = min(reached + max(part, 0.0), 1.0)
        cells = round(reached * width) - used
        used += cells
        drawn += click.style(mark * cells, fg=colour)
    return drawn + " " * (width - used)
