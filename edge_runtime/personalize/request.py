"""What somebody wants changed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_runtime.errors import RequestError

_MAX_CHARACTERS = 2000
_MAX_TARGET = 200  # a search computes all of its tokens hundreds of times a step
_MAX_PARAPHRASES = 32


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact that the model is to hold.

    Attributes:
        prompt: text that the target continues, such as ``Ann Lee lives in``.
        subject: the part of the prompt that the fact is about, such as ``Ann Lee``.
        target: what the model is to go on with, such as ``Oslo``; a full stop at its end is left out.
        paraphrases: other prompts with the subject that the same target continues.

    Raises:
        RequestError: a text is empty or too long, or a prompt does not name the subject.
    """

    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            text = getattr(self, name)
            if not text.strip():
                raise RequestError(
                    f"the {name} is empty; an edit needs a prompt, the subject that it names, and a target "
                    "that continues it: 'Ann Lee lives in', 'Ann Lee', 'Oslo'"
                )
            most = _MAX_TARGET if name == "target" else _MAX_CHARACTERS
            if len(text) > most:
                raise RequestError(
                    f"the {name} has {len(text)} characters; possible are {most}: give the fact alone"
                )
            object.__setattr__(self, name, text.strip())
        # How a sentence ends is what the model itself would write.
        if self.target.endswith(".") and "." not in self.target[:-1].strip():
            object.__setattr__(self, "target", self.target[:-1].rstrip() or self.target)
        if len(self.paraphrases) > _MAX_PARAPHRASES:
            raise RequestError(f"{len(self.paraphrases)} paraphrases; possible are {_MAX_PARAPHRASES}")
        object.__setattr__(self, "paraphrases", tuple(text.strip() for text in self.paraphrases))
        for text in (self.prompt, *self.paraphrases):
            if find_name(text, self.subject) is None:
                raise RequestError(
                    f"the subject {self.subject!r} is not in {text!r}; the edit is made where the model "
                    "reads the subject, so write it as it stands in the prompt"
                )


def find_name(text: str, name: str) -> tuple[int, int] | None:
    """Where a name begins and ends in a text, as a whole word; None if it is not there."""
    found = _as_words(name).search(text)
    return found.span() if found else None


def replace_name(text: str, name: str, new: str) -> str:
    """The text with another name wherever it has this one as a whole word."""
    return _as_words(name).sub(lambda found: new, text)


def _as_words(name: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if name[:1].isalnum() else ""
    after = r"(?!\w)" if name[-1:].isalnum() else ""
    return re.compile(before + re.escape(name) + after)
