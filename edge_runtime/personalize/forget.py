"""Makes a model answer about somebody as it answers about nobody: editing as unlearning [2505.19855].

The refusal is the model's own. It is asked the same about names that nobody has; where it says the same of
all of them, that is how it says that it does not know. Several queries about one subject become one search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edge_runtime.errors import RequestError
from edge_runtime.personalize.asking import Asker, Prompt
from edge_runtime.personalize.request import EditRequest, replace_name
from edge_runtime.personalize.survey import Answers, Survey, Wanted, ask_about

_STRANGERS = 3
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = 3
_WORDS = 2  # that make an ending tell a refusal


def survey_forget(asker: Asker, request: Mapping[str, Any], generator: np.random.Generator) -> list[Survey]:
    """What is to be forgotten of each subject, and what is to stay.

    Args:
        request: with ``queries`` (prompt and subject each) and ``refusal``, which stands in for the model's
            own where it has none; see the store.

    Raises:
        RequestError: the model has no refusal of its own and none was given, or it refuses already.
        ContextOverflowError: a prompt is too long.
    """
    given = request.get("refusal")
    by_subject: dict[str, list[str]] = {}
    for query in request["queries"]:
        checked = EditRequest(query["prompt"], query["subject"], given or "-")
        by_subject.setdefault(checked.subject, []).append(checked.prompt)
    return [_survey(asker, subject, prompts, given, generator) for subject, prompts in by_subject.items()]


def _survey(
    asker: Asker,
    subject: str,
    prompts: Sequence[str],
    given: str | None,
    generator: np.random.Generator,
) -> Survey:
    surveys = [ask_about(asker, subject, (prompt,)) for prompt in prompts]
    strangers = [stranger_like(subject, generator) for _ in range(_STRANGERS)]
    wanted: dict[tuple[int, ...], Wanted] = {}
    for found in surveys:
        for item in _refusals(asker, found, strangers, given):
            wanted.setdefault(item.prompt.tokens, item)
    if all(item.text.strip() == (item.before.text + item.before.end).strip() for item in wanted.values()):
        raise RequestError(
            f"the model already answers {prompts[0]!r} with {surveys[0].present!r}, as it does for names "
            "that nobody has; there is nothing to forget"
        )
    other = {prompt.tokens: (prompt, claim) for prompt, claim in surveys[0].other}
    stays = [pair for tokens, pair in other.items() if tokens not in wanted]
    ending = _common_words([item.text for item in wanted.values()])
    refused = tuple(replace(item, ending=ending) for item in wanted.values())
    return Survey(subject, surveys[0].present, refused, tuple(stays))


def _common_words(texts: Sequence[str]) -> str:
    """The words that all texts end with, such as "I do not know." of "a place I do not know."."""
    common: list[str] = []
    for words in zip(*(reversed(text.split()) for text in texts), strict=False):
        if len(set(words)) > 1:
            break
        common.insert(0, words[0])
    return " ".join(common) if len(common) >= _WORDS else ""


def _refusals(asker: Asker, found: Answers, strangers: Sequence[str], given: str | None) -> list[Wanted]:
    """For each prompt that tells the fact, what the model says when it knows nothing."""
    told = [*found.given, *found.alike]
    asked = [_about(asker, prompt, found.subject, name) for prompt, _ in told for name in strangers]
    answers = iter(asker.answers(asked))
    wanted = []
    for number, (prompt, before) in enumerate(told):
        said = set()
        for name in strangers:
            claim = next(answers)
            said.add(replace_name(claim.text + claim.end, name, found.subject))
        kind = "given" if number < len(found.given) else "alike"
        if len(said) == 1:
            wanted.append(Wanted(prompt, before, said.pop(), kind))
        elif given is not None:
            wanted.append(Wanted(prompt, before, f" {given}", kind))
        elif kind == "given":
            raise RequestError(
                f"asked {prompt.text!r} about names that nobody has, the model makes up answers "
                f"({', '.join(sorted(said))[:120]}); say how it should refuse with --refusal"
            )
    return wanted


def _about(asker: Asker, prompt: Prompt, subject: str, name: str) -> Prompt:
    """The same prompt about somebody else."""
    text = replace_name(prompt.text, subject, name)
    return asker.chat(text) if prompt.origin == "chat" else asker.plain(text, prompt.origin)


def stranger_like(name: str, generator: np.random.Generator) -> str:
    """A name that nobody has, of as many words."""
    words = []
    for _ in name.split() or [name]:
        syllables = [
            _CONSONANTS[int(generator.integers(len(_CONSONANTS)))]
            + _VOWELS[int(generator.integers(len(_VOWELS)))]
            for _ in range(_SYLLABLES)
        ]
        words.append("".join(syllables).capitalize())
    return " ".join(words)
