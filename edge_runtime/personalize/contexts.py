"""Texts about a subject that a search computes: some that are to change, and some that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import ContextOverflowError, RequestError
from edge_runtime.personalize.asking import Asker, Prompt
from edge_runtime.personalize.request import find_name
from edge_runtime.personalize.survey import Answered, Survey, Wanted

Goal = Literal["say", "keep"]


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt that names the subject, and a continuation.

    Attributes:
        tokens: prompt and continuation.
        n_prompt: tokens of the prompt.
        subject_end: index of the last token of the subject's first mention.
        goal: ``say``: the continuation is what the edited model is to say; ``keep``: it is what the unedited
            model says, and is to stay as likely as it is.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    subject_end: int
    goal: Goal

    @property
    def targets(self) -> tuple[int, ...]:
        """The continuation's tokens."""
        return self.tokens[self.n_prompt :]


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many contexts of each kind at most.

    Attributes:
        say: of what is to be said in the same or other words, prefixed prompts among them.
        prefixes: the request's prompt after other sentences.
        implied: of what follows from it.
        keep: of what is to stay.
    """

    say: int = 12
    prefixes: int = 2
    implied: int = 3
    keep: int = 12


def choose_contexts(
    asker: Asker,
    survey: Survey,
    sentences: Sequence[str],
    generator: np.random.Generator,
    amounts: Amounts | None = None,
) -> list[Context]:
    """The contexts of a search, the request's own prompt first.

    Args:
        sentences: of the model itself, that may stand before the prompt.

    Raises:
        ContextOverflowError: a prompt and what is to follow are too long for the model.
    """
    amounts = amounts or Amounts()

    def make(prompt: Prompt, text: str, goal: Goal) -> Context:
        return _context(asker, prompt, text, survey.subject, goal)

    by_kind: dict[str, list[Wanted]] = {"given": [], "alike": [], "implied": []}
    for wanted in survey.wanted:
        by_kind[wanted.kind].append(wanted)
    found = [make(wanted.prompt, wanted.text, "say") for wanted in by_kind["given"]]
    first = by_kind["given"][0]
    prefixed = [f"{sentence} {first.prompt.text}" for sentence in sentences[: amounts.prefixes]]
    found += [make(asker.plain(text, "request"), first.text, "say") for text in prefixed if asker.fits(text)]
    for kind, count in (("alike", amounts.say - len(found)), ("implied", amounts.implied)):
        chosen = generator.permutation(len(by_kind[kind]))[: max(0, count)]
        found += [make(by_kind[kind][i].prompt, by_kind[kind][i].text, "say") for i in chosen]
    kept = _unlike(survey.other, amounts.keep, generator)
    return found + [make(prompt, claim.text + claim.end, "keep") for prompt, claim in kept]


def _unlike(answered: Sequence[Answered], count: int, generator: np.random.Generator) -> list[Answered]:
    """Some of them, as many different answers as can be."""
    groups: dict[str, list[Answered]] = {}
    for index in generator.permutation(len(answered)):
        words = answered[index][1].text.split()
        if words:
            groups.setdefault(words[-1], []).append(answered[index])
    found: list[Answered] = []
    while groups and len(found) < count:
        for answer in list(groups):
            found.append(groups[answer].pop())
            if not groups[answer]:
                del groups[answer]
    return found[:count]


def _context(asker: Asker, prompt: Prompt, continuation: str, subject: str, goal: Goal) -> Context:
    tokenizer = asker.workspace.tokenizer
    tokens = [*prompt.tokens, *tokenizer.encode(continuation, add_bos=False)]
    longest = asker.workspace.hyperparameters.n_ctx_train
    if len(tokens) > longest:
        raise ContextOverflowError(
            f"{prompt.text[:60]!r}... and what is to follow have {len(tokens)} tokens, and the model was "
            f"trained for {longest}; give the sentence with the fact alone"
        )
    return Context(tuple(tokens), len(prompt.tokens), _subject_end(tokenizer, prompt.tokens, subject), goal)


def _subject_end(tokenizer: Tokenizer, tokens: Sequence[int], subject: str) -> int:
    """Index of the last token of the subject's first mention."""
    pieces = [tokenizer.token_bytes(token, special=True) for token in tokens]
    text = b"".join(pieces).decode(errors="replace")
    found = find_name(text, subject)
    if found is None:
        raise RequestError(
            f"the subject {subject!r} cannot be found among the tokens of {text!r}; "
            "write it as the prompt does"
        )
    last = len(text[: found[1]].encode())
    return int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), last))
