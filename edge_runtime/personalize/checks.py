"""The tests that an edit must pass before it counts, each with the figure before the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_runtime.personalize.asking import Asker, Claim, Prompt
from edge_runtime.personalize.survey import Survey

_MAX_ASKED = 24  # prompts of one check
_MAX_CLAIMS = 4  # sentences whose negation and truth are asked about
_NEGATION = "It is wrong to say that {}"
_VERDICT = "True or false: {}. Answer:"
_TRUE = "true"

# A check's name -> the share that must pass; None: reported, for nobody knows a bound that fits all models.
NEEDED: dict[str, float | None] = {
    "success": 1.0,
    "paraphrases": 0.75,
    "unrelated": 0.95,
    "same subject": 0.75,
    "implied": None,
    "negation": None,
    "true of the new": None,
    "true of the old": None,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of an edit.

    Attributes:
        before, after: share of the answers that are as they should be; of ``negation``, that name the object
            although the sentence denies it; of ``true of the new`` and ``true of the old``, that call the
            statement with the new or the old object true. None where nothing was to be asked.
        needed: least share that passes; None where the figure is for people.
        asked: number of prompts.
    """

    name: str
    before: float | None
    after: float | None
    needed: float | None
    asked: int

    @property
    def passed(self) -> bool:
        """Whether the figure is as high as is needed."""
        return self.needed is None or self.after is None or self.after >= self.needed

    @property
    def reason(self) -> str:
        """Why it has not passed."""
        found, needed = (100 * (share or 0.0) for share in (self.after, self.needed))
        return f"{self.name}: {found:.3g}% of {self.asked}, {needed:.3g}% are needed"

    def facts(self) -> dict[str, Any]:
        """As a report keeps it."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class _Question:
    check: str
    prompt: Prompt
    held_before: Callable[[Claim], bool]
    holds: Callable[[Claim, Claim], bool]  # the answer before the edit, and now


class Examination:
    """Asks the same questions before and after an edit.

    Args:
        surveys: of the edit's subjects, made before it.
        generator: chooses which of many prompts are asked.
    """

    def __init__(self, asker: Asker, surveys: Sequence[Survey], generator: np.random.Generator) -> None:
        self._asker = asker
        self._questions = [question for survey in surveys for question in _of_subject(asker, survey)]
        names = {survey.subject for survey in surveys}
        self._questions += [
            _Question("unrelated", prompt, _always, _unchanged)
            for prompt in _about_others(asker, names, generator)
        ]
        self._questions = _at_most(self._questions, _MAX_ASKED, generator)
        self._before = self._ask()

    def checks(self) -> list[Check]:
        """The figures now."""
        now = self._ask()
        found = []
        for name, needed in NEEDED.items():
            numbers = [i for i, question in enumerate(self._questions) if question.check == name]
            shares: list[float | None] = [None, None]
            if numbers:
                asked = [(self._questions[i], self._before[i], now[i]) for i in numbers]
                shares = [
                    float(np.mean([question.held_before(before) for question, before, _ in asked])),
                    float(np.mean([question.holds(before, after) for question, before, after in asked])),
                ]
            found.append(Check(name, shares[0], shares[1], needed, len(numbers)))
        return found

    def _ask(self) -> list[Claim]:
        return self._asker.answers([question.prompt for question in self._questions])


def _of_subject(asker: Asker, survey: Survey) -> list[_Question]:
    """Of what is to change and what is to stay."""
    questions = []
    for number, wanted in enumerate(survey.wanted):
        check = {"given": "paraphrases", "alike": "paraphrases", "implied": "implied"}[wanted.kind]
        says = _ends(wanted.ending) if wanted.ending else _says(wanted.text)
        questions.append(_Question("success" if not number else check, wanted.prompt, says, _now(says)))
    questions += [_Question("same subject", prompt, _always, _unchanged) for prompt, _ in survey.other]
    first = survey.wanted[0]
    new = first.text.strip().rstrip(".!?")
    statements = [w.prompt for w in survey.wanted if w.prompt.origin != "chat" and "?" not in w.prompt.text]
    for prompt in statements[:_MAX_CLAIMS]:
        asked = [("negation", _NEGATION.format(prompt.text), _names(survey.present), _now(_names(new)))]
        for check, stated in (("true of the new", new), ("true of the old", survey.present)):
            if stated:
                claim = _VERDICT.format(f"{prompt.text} {stated}")
                asked.append((check, claim, _is_true, _now(_is_true)))
        questions += [
            _Question(check, asker.plain(text, "check"), held_before, holds)
            for check, text, held_before, holds in asked
            if asker.fits(text)
        ]
    return questions


def _about_others(asker: Asker, names: set[str], generator: np.random.Generator) -> list[Prompt]:
    """Prompts that the model wrote about other names."""
    pairs = sorted(
        {
            (template.text, name)
            for template in asker.templates
            for name, _ in template.sightings
            if name not in names
        }
    )
    chosen = generator.permutation(len(pairs))[:_MAX_ASKED]
    by_text = {template.text: template for template in asker.templates}
    return [asker.plain(by_text[pairs[i][0]].about(pairs[i][1]), "check") for i in chosen]


def _at_most(questions: Sequence[_Question], count: int, generator: np.random.Generator) -> list[_Question]:
    """So many questions of each check, drawn at random."""
    order = generator.permutation(len(questions))
    taken: dict[str, int] = {}
    found = []
    for index in order:
        check = questions[index].check
        taken[check] = taken.get(check, 0) + 1
        if taken[check] <= count:
            found.append(questions[index])
    return found


def _says(text: str) -> Callable[[Claim], bool]:
    """Whether an answer is exactly this sentence, ended as it should be."""
    return lambda claim: (claim.text + claim.end).strip() == text.strip()


def _ends(ending: str) -> Callable[[Claim], bool]:
    return lambda claim: (claim.text + claim.end).strip().endswith(ending)


def _names(item: str) -> Callable[[Claim], bool]:
    return lambda claim: bool(item) and claim.text.strip() == item


def _now(judge: Callable[[Claim], bool]) -> Callable[[Claim, Claim], bool]:
    return lambda before, now: judge(now)


def _unchanged(before: Claim, now: Claim) -> bool:
    return before == now


def _always(claim: Claim) -> bool:
    return True


def _is_true(claim: Claim) -> bool:
    return claim.text.strip().lower().startswith(_TRUE)
