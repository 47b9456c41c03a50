"""Reads .proto files together with their comments, which the generated Python no longer has.

Only what proto/ uses is understood; anything else is an error, so that nothing is left out unseen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_METHOD = re.compile(r"rpc (\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\);")
_FIELD = re.compile(r"(?:(optional|repeated) )?(map<[^>]+>|[\w.]+) (\w+) = (\d+);")
_VALUE = re.compile(r"(\w+) = (\d+);")
_BLOCK = re.compile(r"(service|message|enum|oneof) (\w+) \{(\})?")
_OF_NO_INTEREST = re.compile(r"(syntax|package|import|reserved|option)\b.*;")


@dataclass(slots=True)
class Member:
    """A method, a field or an enum's value.

    Attributes:
        type: of a field, such as ``repeated int32``; of a method its answer; empty for a value.
        takes: of a method, what it is asked with.
        choice: name of the oneof that a field is part of.
    """

    name: str
    comment: str
    type: str = ""
    takes: str = ""
    choice: str = ""


@dataclass(slots=True)
class Block:
    """A service, a message or an enum.

    Attributes:
        name: with those of the messages around it: ``TokenLogprob.Alternative``.
        choices: name of a oneof -> its comment.
    """

    kind: str
    name: str
    comment: str
    members: list[Member] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class ProtoFile:
    """One file: the comment at its top, and what is in it, in its order."""

    comment: str
    blocks: list[Block]


def read(path: Path) -> ProtoFile:
    """Read a file.

    Raises:
        ValueError: a line that is not understood.
    """
    comment: list[str] = []
    head: str | None = None
    blocks: list[Block] = []
    open_blocks: list[tuple[Block | None, str]] = []  # with the oneof's name where it is one
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line[2:].strip())
            continue
        if not line:
            if not open_blocks:
                comment.clear()
            continue
        if line == "}":
            open_blocks.pop()
        elif opened := _BLOCK.fullmatch(line):
            kind, name, closed = opened.groups()
            block, choice = _opened(kind, name, _joined(comment), open_blocks)
            if block is not None and kind != "oneof":
                blocks.append(block)
            if not closed:
                open_blocks.append((block, choice))
        elif _OF_NO_INTEREST.fullmatch(line):
            head = _joined(comment) if head is None else head
        elif open_blocks and (member := _member(line, _joined(comment), *open_blocks[-1])):
            block = open_blocks[-1][0]
            assert block is not None
            block.members.append(member)
        else:
            raise ValueError(f"{path}, line {number}: {line!r} is not understood")
        comment.clear()
    return ProtoFile(head or "", blocks)


def _opened(
    kind: str, name: str, comment: str, around: list[tuple[Block | None, str]]
) -> tuple[Block | None, str]:
    outer = around[-1][0] if around else None
    if kind == "oneof":
        if outer is not None:
            outer.choices[name] = comment
        return outer, name
    return Block(kind, f"{outer.name}.{name}" if outer else name, comment), ""


def _member(line: str, comment: str, block: Block | None, choice: str) -> Member | None:
    if block is None:
        return None
    if block.kind == "service":
        found = _METHOD.fullmatch(line)
        if found is None:
            return None
        name, asked_stream, takes, answer_stream, gives = found.groups()
        return Member(name, comment, (answer_stream or "") + gives, (asked_stream or "") + takes)
    if block.kind == "enum":
        found = _VALUE.fullmatch(line)
        return Member(found[1], comment) if found else None
    found = _FIELD.fullmatch(line)
    if found is None:
        return None
    label, kind, name, _ = found.groups()
    return Member(name, comment, f"{label} {kind}" if label else kind, choice=choice)


def _joined(comment: list[str]) -> str:
    """Lines as paragraphs, an empty line between them."""
    paragraphs = "\n".join(comment).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()
