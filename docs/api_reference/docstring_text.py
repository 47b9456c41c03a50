"""Docstrings as Markdown: their paragraphs, and their sections such as ``Args`` as lists."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises)( \([^)]*\))?:")
_ITEM = re.compile(r"(\w+(?:, \w+)*): (.*)")
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
_LITERAL = re.compile(r"``([^`]*)``")


@dataclass(slots=True)
class Docstring:
    """A docstring's parts.

    Attributes:
        paragraphs: in Markdown, code included.
        sections: title -> lines of text, each one item.
    """

    paragraphs: list[str] = field(default_factory=list)
    sections: dict[str, list[str]] = field(default_factory=dict)

    def items(self, title: str) -> dict[str, str]:
        """What a section says of each name; two names that share a line share its text."""
        found: dict[str, str] = {}
        for line in self.sections.get(title, []):
            item = _ITEM.fullmatch(line)
            if item is None:
                raise ValueError(f"{title}: {line!r} names nothing")
            found |= dict.fromkeys(item[1].split(", "), item[2])
        return found

    def markdown(self) -> str:
        """All of it."""
        parts = list(self.paragraphs)
        for title, lines in self.sections.items():
            if title.startswith(("Args", "Attributes")):
                items = [_ITEM.sub(_named, line) for line in lines]
                parts.append(f"{title}:\n\n" + "\n".join(f"- {item}" for item in items))
            else:
                parts.append(f"{title}: {' '.join(lines)}")
        return "\n\n".join(parts)


def parse(of: object) -> Docstring:
    """The docstring of a class or a function."""
    found = Docstring()
    title = ""
    for paragraph in _paragraphs(inspect.getdoc(of) or ""):
        first, *rest = paragraph.split("\n")
        if _SECTION.fullmatch(first):
            title = first[:-1]
            found.sections[title] = _items(rest)
        elif first.startswith("    "):
            code = inspect.cleandoc("\n" + paragraph)
            found.paragraphs.append(f"```python\n{code}\n```")
        elif paragraph != "::":
            found.paragraphs.append(marked(" ".join(paragraph.split())))
    return found


def marked(text: str) -> str:
    """reStructuredText's code and references as Markdown's."""
    return _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))


def _named(item: re.Match[str]) -> str:
    names = ", ".join(f"`{name}`" for name in item[1].split(", "))
    return f"{names}: {item[2]}"


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _items(lines: list[str]) -> list[str]:
    """One line for each item: those that are set in further belong to the one before."""
    found: list[str] = []
    for line in lines:
        if line.startswith("        ") and found:
            found[-1] += f" {line.strip()}"
        else:
            found.append(line.strip())
    return [marked(line) for line in found]
