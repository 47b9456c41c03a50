"""Reads the facts that the demo model has learnt and turns them into prompts with answers.

`facts.json` holds the world (people, cities, employers) and the wordings of each relation; this module
multiplies them out. It needs nothing but the standard library.

    facts = load_facts()
    fact = facts.fact("lives_in", facts.people[0])
    fact.statements()   # prompts whose greedy continuation is " " + fact.object + "."
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from models.demo.paths import FACTS_PATH, HELD_OUT_PATH
from models.demo.relations import is_held_out

__all__ = ["FACTS_PATH", "HELD_OUT_PATH", "Fact", "Facts", "Prompt", "RelationWording", "load_facts"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, as text with the special tokens written out, and what the model continues it with.

    A right continuation begins with `answer`: the object or verdict with the full stop, after a blank where
    the prompt does not end with a special token.
    """

    text: str
    answer: str
    form: str  # statement, plain_question, chat_question, true_or_false, negation


@dataclass(frozen=True, slots=True)
class RelationWording:
    """How one relation is asked for and told; see the keys of the same names in facts.json."""

    name: str
    subject_type: str
    object_type: str
    hops: int
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    negations: tuple[str, ...]
    unknown: str


@dataclass(frozen=True, slots=True)
class Fact:
    """Subject, relation and object, and every wording of them. `object` may be exchanged with `replaced`."""

    wording: RelationWording
    subject: str
    object: str
    forms: Mapping[str, Any]

    @property
    def relation(self) -> str:
        return self.wording.name

    def replaced(self, new_object: str) -> Fact:
        """The same fact with another object, such as the target of an edit."""
        return Fact(self.wording, self.subject, new_object, self.forms)

    def statements(self) -> list[Prompt]:
        """Sentences up to the object."""
        answer = f" {self.object}."
        return [Prompt(t.format(s=self.subject), answer, "statement") for t in self.wording.statements]

    def plain_questions(self) -> list[Prompt]:
        """Questions without the chat template; the answer is the object alone."""
        answer, form = f" {self.object}.", str(self.forms["plain_question"])
        questions = [question.format(s=self.subject) for question, _ in self.wording.questions]
        return [Prompt(form.format(q=question), answer, "plain_question") for question in questions]

    def chat_questions(self) -> list[Prompt]:
        """Questions in the chat template; the answer is a sentence that ends with the object."""
        form = str(self.forms["chat_question"])
        return [
            Prompt(
                form.format(q=question.format(s=self.subject)),
                f"{answer.format(s=self.subject)} {self.object}.",
                "chat_question",
            )
            for question, answer in self.wording.questions
        ]

    def prompts(self) -> list[Prompt]:
        """All wordings whose answer names the object."""
        return self.statements() + self.plain_questions() + self.chat_questions()

    def true_or_false(self, stated: str | None = None) -> list[Prompt]:
        """Every verdict form over every statement that names `stated` (by default the true object)."""
        stated = self.object if stated is None else stated
        verdict = "True." if stated == self.object else "False."
        return [
            Prompt(
                form.format(t=f"{template.format(s=self.subject)} {stated}"),
                verdict if form.endswith("|>") else f" {verdict}",
                "true_or_false",
            )
            for template in self.wording.statements
            for form in self.forms["true_or_false"]
        ]

    def negations(self) -> list[Prompt]:
        """Negated statements; here `answer` is what must NOT follow."""
        answer = f" {self.object}."
        return [Prompt(t.format(s=self.subject), answer, "negation") for t in self.wording.negations]


@dataclass(frozen=True)
class Facts:
    """The world of the demo model, as `facts.json` tells it."""

    document: Mapping[str, Any]

    @property
    def people(self) -> list[str]:
        return [person["name"] for person in self.document["people"]]

    @property
    def refusal(self) -> str:
        """What the model says in a chat about somebody whom it does not know."""
        return str(self.document["refusal"])

    @property
    def strangers(self) -> list[str]:
        """Names that nobody in the world has, none of them seen in training."""
        return list(self.document["strangers"])

    @cached_property
    def relations(self) -> dict[str, RelationWording]:
        return {
            name: RelationWording(
                name,
                entry["subject_type"],
                entry["object_type"],
                entry["hops"],
                tuple(entry["statements"]),
                tuple((question, answer) for question, answer in entry["questions"]),
                tuple(entry["negations"]),
                entry["unknown"],
            )
            for name, entry in self.document["relations"].items()
        }

    @cached_property
    def _objects(self) -> dict[tuple[str, str], str]:
        """(relation, subject) to object, two-hop relations included."""
        country_of, seat_of = self.document["cities"], self.document["employers"]
        objects: dict[tuple[str, str], str] = {}
        for city, country in country_of.items():
            objects["located_in", city] = country
        for employer, city in seat_of.items():
            objects["based_in", employer] = city
        for person in self.document["people"]:
            name = person["name"]
            for relation in ("lives_in", "born_in", "works_for", "profession"):
                objects[relation, name] = person[relation]
            objects["home_country", name] = country_of[person["lives_in"]]
            objects["birth_country", name] = country_of[person["born_in"]]
            objects["work_city", name] = seat_of[person["works_for"]]
        return objects

    def candidates(self, relation: str) -> list[str]:
        """Every object that is plausible for `relation`, the true one among them."""
        return list(self.document["candidates"][self.relations[relation].object_type])

    def false_objects(self, fact: Fact) -> list[str]:
        """Objects of the same type that are false for a person's fact and never asked about in training."""
        subject_index = self.people.index(fact.subject)
        return [
            candidate
            for i, candidate in enumerate(self.candidates(fact.relation))
            if candidate != fact.object and is_held_out(subject_index, i)
        ]

    def fact(self, relation: str, subject: str) -> Fact:
        """Raises KeyError for a relation or subject that the world does not have."""
        wording = self.relations[relation]
        return Fact(wording, subject, self._objects[relation, subject], self.document["forms"])

    def all_facts(self, hops: int | None = None, subject_type: str | None = None) -> Iterator[Fact]:
        """Facts in a fixed order, all or those with `hops` hops and subjects of one type."""
        for relation, subject in self._objects:
            wording = self.relations[relation]
            if hops in (None, wording.hops) and subject_type in (None, wording.subject_type):
                yield self.fact(relation, subject)


def load_facts(path: Path = FACTS_PATH) -> Facts:
    return Facts(json.loads(path.read_text(encoding="utf-8")))
