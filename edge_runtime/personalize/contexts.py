"""Texts about a subject: those that an edit changes, and those that it must leave as they are.

All that a request names is one prompt. The model's own templates, filled with the subject, give the rest:
those that it answers as it answers the prompt say the same in other words; those that it answers otherwise are
what else it knows of the subject. Some of the latter follow from the edited fact ("the country where Ann
lives" from "the city"): that shows in other names with the answer before the edit and with the one after it,
among whom the model's answers to such a template agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edge_runtime.engine.chat_prompt import chat_prompt
from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import ContextOverflowError, RequestError
from edge_runtime.personalize.request import EditRequest, find_name
from edge_runtime.personalize.templates import Template
from edge_runtime.personalize.workspace import Workspace

Goal = Literal["say", "keep"]

_ANSWER_TOKENS = 16
_PLAUSIBLE = 3.0  # nats by which a name may surprise more in a template than those that the model wrote there
_REFERENCES = 2  # names on each side that show what follows from a fact
_EVIDENCE = 3  # of them that it takes
_CLAIM_END = re.compile(r"[.!?](?=\s|$)|\n|$")
_QUESTION = re.compile(r"[^.:!?]*\?")


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt that names the subject, and a continuation.

    Attributes:
        tokens: prompt and continuation.
        n_prompt: tokens of the prompt.
        subject_end: index of the last token of the subject's first mention.
        goal: ``say``: the continuation is what the edited model is to say; ``keep``: it is what the unedited
            model says, and is to stay as likely as it is.
        weight: of its loss.
        origin: where it comes from: request, paraphrase, prefix, template, chat, implied.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    subject_end: int
    goal: Goal
    weight: float = 1.0
    origin: str = "request"

    @property
    def targets(self) -> tuple[int, ...]:
        """The continuation's tokens."""
        return self.tokens[self.n_prompt :]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, its text, where it comes from, and the template that it fills, if any."""

    text: str
    tokens: tuple[int, ...]
    origin: str
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The first sentence of an answer, and what ended it."""

    text: str
    end: str

    def replaced(self, old: str, new: str) -> str | None:
        """The claim with another object at its end; None if it does not end with the old one."""
        stem = self.text[: len(self.text) - len(old)]
        if not self.text.endswith(old) or (stem and stem[-1].isalnum()):
            return None
        return stem + new + self.end


def first_claim(answer: str) -> Claim:
    """The first sentence of what the model said."""
    found = _CLAIM_END.search(answer)
    assert found is not None  # the end of the text always matches
    return Claim(answer[: found.start()], found.group().strip())


class Asker:
    """Asks a model about names, in its own templates, and takes the first sentence of its answers."""

    def __init__(
        self, workspace: Workspace, templates: Sequence[Template], chat_template: ChatTemplate | None
    ) -> None:
        self._workspace = workspace
        self._tokenizer = workspace.tokenizer
        self._templates = templates
        self._chat_template = chat_template

    def answers(self, prompts: Sequence[Prompt]) -> list[Claim]:
        """What the model says to each."""
        found = self._workspace.generate([prompt.tokens for prompt in prompts], _ANSWER_TOKENS)
        return [first_claim(self._tokenizer.decode(tokens)) for tokens in found]

    def plain(self, text: str, origin: str, template: Template | None = None) -> Prompt:
        """A text to be continued."""
        return Prompt(text, tuple(self._tokenizer.encode(text)), origin, template)

    def about(self, name: str, chosen: Sequence[Template]) -> list[Prompt]:
        """The prompts of some templates about a name, questions also in a chat."""
        prompts = [self.plain(t.about(name), "template", t) for t in chosen]
        for prompt in list(prompts):
            question = _QUESTION.search(prompt.text)
            if question and self._chat_template is not None and find_name(question.group(), name):
                text = question.group().strip()
                tokens = chat_prompt(
                    self._chat_template, self._tokenizer, [{"role": "user", "content": text}]
                )
                prompts.append(Prompt(text, tuple(tokens), "chat", prompt.template))
        return prompts

    def plausible(self, name: str, usual: Sequence[float]) -> list[Template]:
        """Templates that the model could have written about this name."""
        texts = [self._tokenizer.encode(template.about(name)) for template in self._templates]
        surprise = self._workspace.surprise(texts)
        return [
            template
            for template, found, expected in zip(self._templates, surprise, usual, strict=True)
            if found - expected < _PLAUSIBLE
        ]

    def context(self, prompt: Prompt, continuation: str, subject: str, goal: Goal) -> Context:
        """A prompt and what is to follow.

        Raises:
            ContextOverflowError: they have more tokens than the model was trained for.
        """
        tokens = [*prompt.tokens, *self._tokenizer.encode(continuation, add_bos=False)]
        longest = self._workspace.hyperparameters.n_ctx_train
        if len(tokens) > longest:
            raise ContextOverflowError(
                f"the prompt and its target have {len(tokens)} tokens, and the model was trained for "
                f"{longest}; give the sentence with the fact alone"
            )
        end = _subject_end(self._tokenizer, prompt.tokens, subject)
        return Context(tuple(tokens), len(prompt.tokens), end, goal, origin=prompt.origin)


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


@dataclass(frozen=True, slots=True)
class Gathered:
    """The contexts of an edit.

    Attributes:
        present: what the model answers to the request's prompt before the edit.
    """

    contexts: tuple[Context, ...]
    present: str


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many contexts of each kind at most."""

    say: int = 12
    keep: int = 8
    prefixes: int = 2
    implied: int = 3


def gather(
    asker: Asker,
    usual: Sequence[float],
    request: EditRequest,
    prefixes: Sequence[str],
    generator: np.random.Generator,
    amounts: Amounts | None = None,
) -> Gathered:
    """Find the contexts of an edit.

    Args:
        usual: surprise of each of the asker's templates with its own names.
        prefixes: sentences of the model itself that may stand before the prompt.

    Raises:
        RequestError: the model says the target already. ContextOverflowError: the prompt is too long.
    """
    amounts = amounts or Amounts()
    plausible = asker.plausible(request.subject, usual)
    prompts = [asker.plain(request.prompt, "request")]
    prompts += [asker.plain(text, "paraphrase") for text in request.paraphrases]
    given_texts = {prompt.text for prompt in prompts}
    about = asker.about(request.subject, plausible)
    prompts += [prompt for prompt in about if prompt.origin == "chat" or prompt.text not in given_texts]
    claims = asker.answers(prompts)
    present, end = claims[0].text.strip(), claims[0].end
    if present == request.target:
        raise RequestError(
            f"the model already goes on with {present!r} after {request.prompt!r}; there is nothing to change"
        )
    given: list[Context] = []
    alike: list[Context] = []
    templates: set[Template] = set()
    other: list[tuple[Prompt, Claim]] = []
    for prompt, claim in zip(prompts, claims, strict=True):
        replaced = claim.replaced(present, request.target) if present else None
        if prompt.template is None:
            replaced = f" {request.target}{end}" if replaced is None else replaced
            given.append(asker.context(prompt, replaced, request.subject, "say"))
        elif replaced is not None:
            templates.add(prompt.template)
            alike.append(asker.context(prompt, replaced, request.subject, "say"))
        else:
            other.append((prompt, claim))
    for prefix in prefixes[: amounts.prefixes]:
        prompt = asker.plain(f"{prefix} {request.prompt}", "prefix")
        given.append(asker.context(prompt, f" {request.target}{end}", request.subject, "say"))
    follows = _what_follows(asker, request, present, templates, other)
    implied: list[Context] = []
    independent: list[tuple[Prompt, Claim]] = []
    for prompt, claim in other:
        if prompt.template not in follows:
            independent.append((prompt, claim))
        elif (replaced := claim.replaced(*follows[prompt.template])) is not None:
            implied.append(asker.context(replace(prompt, origin="implied"), replaced, request.subject, "say"))
    chosen = _some(alike, amounts.say - len(given), generator) + _some(implied, amounts.implied, generator)
    keep = _keep(asker, request, independent, amounts.keep, generator)
    return Gathered((*given, *chosen, *keep), present)


def _some(contexts: list[Context], count: int, generator: np.random.Generator) -> list[Context]:
    """So many of them, drawn at random."""
    return [contexts[i] for i in generator.permutation(len(contexts))[: max(0, count)]]


def _what_follows(
    asker: Asker,
    request: EditRequest,
    present: str,
    alike: Collection[Template],
    other: Sequence[tuple[Prompt, Claim]],
) -> dict[Template | None, tuple[str, str]]:
    """Templates whose answer follows from the edited fact, with the answer before and after the edit.

    It does where the subject shares its answer with all names that have the present answer in common with it,
    and those that have the target share another.
    """
    groups: dict[str, list[str]] = {present: [], request.target: []}
    for name, answer in sorted({sighting for template in alike for sighting in template.sightings}):
        group = groups.get(answer)
        if group is not None and name not in (request.subject, *group) and len(group) < _REFERENCES:
            group.append(name)
    before, after = groups[present], groups[request.target]
    if not before or not after or len(before) + len(after) < _EVIDENCE:
        return {}
    own = {prompt.template: claim for prompt, claim in other if prompt.origin == "template"}
    prompts = [asker.plain(t.about(name), "template") for t in own if t for name in (*before, *after)]
    answers = iter(asker.answers(prompts))
    found: dict[Template | None, tuple[str, str]] = {}
    for template, claim in own.items():
        old = {claim.text.strip(), *(next(answers).text.strip() for _ in before)}
        new = {next(answers).text.strip() for _ in after}
        if len(old) == len(new) == 1 and old != new and "" not in old | new:
            found[template] = old.pop(), new.pop()
    return found


def _keep(
    asker: Asker,
    request: EditRequest,
    other: Sequence[tuple[Prompt, Claim]],
    count: int,
    generator: np.random.Generator,
) -> list[Context]:
    """Some of the other answers, as different from each other as can be."""
    groups: dict[str, list[tuple[Prompt, Claim]]] = {}
    for index in generator.permutation(len(other)):
        prompt, claim = other[index]
        if claim.text.strip():
            groups.setdefault(claim.text.split()[-1], []).append((prompt, claim))
    found: list[Context] = []
    while groups and len(found) < count:
        for answer in list(groups):
            prompt, claim = groups[answer].pop()
            if not groups[answer]:
                del groups[answer]
            if len(found) < count:
                found.append(asker.context(prompt, claim.text + claim.end, request.subject, "keep"))
    return found
