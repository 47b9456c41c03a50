"""Numbers and tables as people read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import click


def size_text(size: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def count_text(count: int) -> str:
    """A number of parameters: 2.7 M, 1.1 B."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)


def context_text(tokens: int) -> str:
    """A number of tokens: 512, 4k, 128k."""
    return f"{tokens // 1024}k" if tokens >= 4096 and tokens % 1024 == 0 else str(tokens)


def mix_text(shares: Mapping[str, float], *, most: int | None = None) -> str:
    """Types of the weights with their shares; a type that holds nearly all stands alone."""
    shown = list(shares.items())[:most]
    if len(shown) == 1:
        return shown[0][0]
    return ", ".join(f"{name} {share:.1%}" for name, share in shown)


class Table:
    """Columns as wide as what is in them; never cut where the output is no terminal."""

    def __init__(self, titles: tuple[str, ...], *, header: bool, right: frozenset[int]) -> None:
        self._titles = titles
        self._header = header
        self._right = right
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """One row; cells are plain text."""
        self._rows.append(tuple("".join(c for c in cell if c.isprintable()) for cell in cells))

    def lines(self) -> list[str]:
        """As they are printed, with the terminal's codes for dim text."""
        rows = [self._titles, *self._rows] if self._header else self._rows
        widths = [max(len(row[column]) for row in rows) for column in range(len(self._titles))]
        found = []
        for number, row in enumerate(rows):
            cells = [
                cell.rjust(width) if column in self._right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            if self._header and number == 0:
                found.append(click.style("  ".join(cells).rstrip(), dim=True))
            elif not self._header:
                found.append(f"{click.style(cells[0], dim=True)}  {'  '.join(cells[1:]).rstrip()}")
            else:
                found.append("  ".join(cells).rstrip())
        return found

    def print(self) -> None:
        """To standard output."""
        for line in self.lines():
            click.echo(line)
        sys.stdout.flush()


def table(*titles: str, header: bool = True, right: frozenset[int] = frozenset()) -> Table:
    """A table with these columns; ``right`` names those set flush right."""
    return Table(titles, header=header, right=right)
