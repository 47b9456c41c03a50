"""What a model knows about a subject before an edit, and what of it the edit will change.

All that a request names is one prompt. The model's own templates, filled with the subject, give the rest:
those that it answers as it answers the prompt say the same in other words; those that it answers otherwise
are what else it knows. Some of the latter follow from the edited fact ("the country where Ann lives" from
"the city"): that shows in other names, some with the answer before the edit and some with the one after it,
among whom the model's answers to such a template agree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edge_runtime.errors import RequestError
from edge_runtime.personalize.asking import Asker, Claim, Prompt
from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.templates import Template

_REFERENCES = 2  # names on each side that show what follows from a fact
_EVIDENCE = 3  # of them that it takes

Answered = tuple[Prompt, Claim]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt, what the model says to it, and what it is to say.

    Attributes:
        text: with the sentence's end.
        kind: given (by the request), alike (the same in other words) or implied.
        ending: where it is enough that the answer ends with this; empty where it must be `text`.
    """

    prompt: Prompt
    before: Claim
    text: str
    kind: str
    ending: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """Of one subject and one fact.

    Attributes:
        subject: whom it is about.
        present: what the model answers to the first prompt.
        wanted: what is to change.
        other: what else the model says of the subject, and is to go on saying.
    """

    subject: str
    present: str
    wanted: tuple[Wanted, ...]
    other: tuple[Answered, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says about a subject, sorted by what it says to the first prompt.

    Attributes:
        given: the request's prompts.
        alike: those whose answers end with the same words.
        other: the rest.
    """

    subject: str
    present: str
    given: tuple[Answered, ...]
    alike: tuple[Answered, ...]
    other: tuple[Answered, ...]


def ask_about(asker: Asker, subject: str, prompts: Sequence[str]) -> Answers:
    """Ask the given prompts, and all templates that the subject fits.

    Raises:
        ContextOverflowError: a prompt is too long.
    """
    given = [asker.plain(text, "paraphrase" if number else "request") for number, text in enumerate(prompts)]
    about = asker.about(subject, asker.plausible(subject))
    about = [prompt for prompt in about if prompt.origin == "chat" or prompt.text not in prompts]
    claims = asker.answers([*given, *about])
    present = claims[0].text.strip()
    answered = list(zip([*given, *about], claims, strict=True))
    rest = answered[len(given) :]
    alike = [pair for pair in rest if pair[1].replaced(present, present) is not None]
    other = [pair for pair in rest if pair[1].replaced(present, present) is None]
    return Answers(subject, present, tuple(answered[: len(given)]), tuple(alike), tuple(other))


def survey_edit(asker: Asker, request: EditRequest) -> Survey:
    """What an edit is to change and to keep.

    Raises:
        RequestError: the model says the target already. ContextOverflowError: a prompt is too long.
    """
    found = ask_about(asker, request.subject, (request.prompt, *request.paraphrases))
    target, end = request.target, found.given[0][1].end
    if found.present == target:
        raise RequestError(
            f"the model already goes on with {target!r} after {request.prompt!r}; there is nothing to change"
        )
    wanted = [
        Wanted(prompt, claim, claim.replaced(found.present, target) or f" {target}{end}", "given")
        for prompt, claim in found.given
    ]
    wanted += [
        Wanted(prompt, claim, claim.replaced(found.present, target) or "", "alike")
        for prompt, claim in found.alike
    ]
    follows = _what_follows(asker, found, target)
    other: list[Answered] = []
    for prompt, claim in found.other:
        new = claim.replaced(*follows[prompt.template]) if prompt.template in follows else None
        if new is not None:
            wanted.append(Wanted(prompt, claim, new, "implied"))
        elif prompt.template not in follows:
            other.append((prompt, claim))
    return Survey(request.subject, found.present, tuple(wanted), tuple(other))


def _what_follows(asker: Asker, found: Answers, target: str) -> dict[Template | None, tuple[str, str]]:
    """Templates whose answer follows from the edited fact, with the answer before and after the edit.

    It does where the subject shares its answer with the other names that have the present answer in common
    with it, and those that have the target share another.
    """
    before, after = _names_with(found, (found.present, target))
    if not before or not after or len(before) + len(after) < _EVIDENCE:
        return {}
    own = {prompt.template: claim for prompt, claim in found.other if prompt.origin == "template"}
    names = (*before, *after)
    answers = iter(
        asker.answers([asker.plain(t.about(name), "template") for t in own if t for name in names])
    )
    follows: dict[Template | None, tuple[str, str]] = {}
    for template, claim in own.items():
        old = {claim.text.strip(), *(next(answers).text.strip() for _ in before)}
        new = {next(answers).text.strip() for _ in after}
        if len(old) == len(new) == 1 and old != new and "" not in old | new:
            follows[template] = old.pop(), new.pop()
    return follows


def _names_with(found: Answers, objects: Sequence[str]) -> list[list[str]]:
    """For each object, names that the model wrote it about in the templates that say the same."""
    templates: Collection[Template] = {prompt.template for prompt, _ in found.alike if prompt.template}
    groups: dict[str, list[str]] = {item: [] for item in objects}
    for name, answer in sorted({sighting for template in templates for sighting in template.sightings}):
        group = groups.get(answer)
        if group is not None and name not in (found.subject, *group) and len(group) < _REFERENCES:
            group.append(name)
    return [groups[item] for item in objects]
