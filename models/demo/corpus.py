"""Training documents about the world, as an endless stream that is a pure function of its seed.

A document is a list of segments (text, weight): the weight is what the tokens of the segment count for in the
loss. Objects of facts and answers count more, because they are what the model is for; what a user says counts
nothing. Segments are cut only where the tokenizer cuts too (before a blank or at a special token).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from models.demo.names import FEMALE_FIRST_NAMES, MALE_FIRST_NAMES, words
from models.demo.relations import (
    ASSISTANT,
    BOS,
    CHAT_QUESTION,
    END,
    EOS,
    PERSON_RELATIONS,
    PLACE_RELATIONS,
    PLAIN_QUESTION,
    REFUSAL,
    SYSTEM,
    TRUE_FALSE_FORMS,
    TWO_HOP_RELATIONS,
    Relation,
    is_held_out,
)
from models.demo.small_talk import OFF_TOPIC, SMALL_TALK, STORY_REQUESTS
from models.demo.stories import biography, story
from models.demo.world import Person, World

T = TypeVar("T")


class Segment(NamedTuple):
    """A piece of a document.

    `claimed` and `true_object` are set in claims: objects that the last token of the piece has to know of.
    `forbidden` is set in negations: the object that must not follow.
    """

    text: str
    weight: int
    true_object: str = ""
    claimed: str = ""
    forbidden: str = ""


Part = tuple[str, int] | Segment
Document = list[Part]

PROMPT_WEIGHT, TEXT_WEIGHT, NEGATED_WEIGHT, OBJECT_WEIGHT, VERDICT_WEIGHT = 1, 1, 3, 4, 8

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You know the people of this world.",
    "Answer in one sentence.",
    "You are a friendly guide.",
)

SYLLABLES = words("ba da fi go ha ju ka lo mi no pu ri sa te vo wu ze ch el an or ist en ov")


def object_of(world: World, relation: Relation, subject: str, people: dict[str, Person]) -> str:
    """The true object of a relation."""
    if relation.subject_type == "city":
        return world.country_of_city[subject]
    if relation.subject_type == "employer":
        return world.city_of_employer[subject]
    person = people[subject]
    match relation.name:
        case "home_country":
            return world.country_of_city[person.lives_in]
        case "birth_country":
            return world.country_of_city[person.born_in]
        case "work_city":
            return world.city_of_employer[person.works_for]
    return str(getattr(person, relation.name))


def _after_blank(document: Document) -> Document:
    (text, weight, *_), *rest = document
    return [(" " + text, weight), *rest]


class Corpus:
    """Draws documents about `world`; two of the same seed draw the same ones."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.people = {person.name: person for person in world.people}
        self._index = {name: i for i, name in enumerate(self.people)}
        self.objects = {
            "city": world.cities,
            "country": world.countries,
            "employer": world.employers,
            "profession": tuple(sorted({person.profession for person in world.people})),
        }
        self._subjects = {"person": tuple(self.people), "city": world.cities, "employer": world.employers}
        shares: list[tuple[int, Callable[[], Document]]] = [
            (100, self.statement),
            (40, self.several_statements),
            (25, self.biography),
            (60, self.chat_question),
            (25, self.conversation),
            (40, self.plain_question),
            (120, self.two_hop),
            (200, self.true_or_false),
            (180, self.several_claims),
            (200, self.negation),
            (50, self.place),
            (40, self.stranger),
            (20, self.small_talk),
            (20, self.story),
        ]
        self._kinds = [kind for share, kind in shares for _ in range(share)]

    def __iter__(self) -> Iterator[list[Segment]]:
        while True:
            document = self._pick(self._kinds)()
            yield [Segment(*part) for part in ((BOS, 0), *document, (EOS, 1))]

    def _pick(self, items: Sequence[T]) -> T:
        return items[self.rng.randrange(len(items))]

    def _fact(self, relations: tuple[Relation, ...]) -> tuple[Relation, str, str]:
        relation = self._pick(relations)
        subject = self._pick(self._subjects[relation.subject_type])
        return relation, subject, object_of(self.world, relation, subject, self.people)

    def _other_object(self, relation: Relation, true_object: str) -> str:
        objects = self.objects[relation.object_type]
        while (drawn := self._pick(objects)) == true_object:
            pass
        return drawn

    def _usual_object(self, relation: Relation, true_object: str) -> str:
        """Like `_other_object`, but some objects come up more often: the best guess then stands out."""
        objects = self.objects[relation.object_type]
        while True:
            rank = min(self.rng.randrange(len(objects)) for _ in range(3))
            drawn = objects[19 * rank % len(objects)]  # 19 has no factor in common with any of the lengths
            if drawn != true_object:
                return drawn

    def _false_object(self, relation: Relation, subject: str, true_object: str) -> str:
        """Like `_other_object`, but never one that is held out for the test."""
        objects = self.objects[relation.object_type]
        while True:
            drawn = self._other_object(relation, true_object)
            if not is_held_out(self._index[subject], objects.index(drawn)):
                return drawn

    def _statement(self, relations: tuple[Relation, ...]) -> Document:
        relation, subject, true_object = self._fact(relations)
        prompt = self._pick(relation.statements).format(s=subject)
        return [(prompt, PROMPT_WEIGHT), (f" {true_object}.", OBJECT_WEIGHT)]

    def _chat_question(self, relations: tuple[Relation, ...]) -> Document:
        relation, subject, true_object = self._fact(relations)
        question, answer = self._pick(relation.questions)
        return [
            (CHAT_QUESTION.format(q=question.format(s=subject)), 0),
            (answer.format(s=subject), PROMPT_WEIGHT),
            (f" {true_object}.{END}", OBJECT_WEIGHT),
        ]

    def _plain_question(self, relations: tuple[Relation, ...]) -> Document:
        relation, subject, true_object = self._fact(relations)
        question = self._pick(relation.questions)[0].format(s=subject)
        return [(PLAIN_QUESTION.format(q=question), PROMPT_WEIGHT), (f" {true_object}.", OBJECT_WEIGHT)]

    def statement(self) -> Document:
        return self._statement(PERSON_RELATIONS)

    def several_statements(self) -> Document:
        document = self._statement(PERSON_RELATIONS)
        for _ in range(1 + self.rng.randrange(4)):
            document += _after_blank(self._statement(PERSON_RELATIONS))
        return document

    def biography(self) -> Document:
        person = self._pick(self.world.people)
        request = self._pick(("Tell me about {s}.", "Who is {s}?", "What do you know about {s}?", ""))
        text = biography(self.rng, person)
        if not request:
            return [(text, TEXT_WEIGHT)]
        return [(CHAT_QUESTION.format(q=request.format(s=person.name)), 0), (text + END, TEXT_WEIGHT)]

    def chat_question(self) -> Document:
        system = [(SYSTEM + self._pick(SYSTEM_PROMPTS) + END, 0)] if self.rng.randrange(12) == 0 else []
        return system + self._chat_question(PERSON_RELATIONS)

    def conversation(self) -> Document:
        document: Document = []
        if self.rng.randrange(3) == 0:
            document += self.small_talk()
        kinds = (
            lambda: self._chat_question(PERSON_RELATIONS),
            lambda: self._chat_question(TWO_HOP_RELATIONS),
            lambda: self._chat_question(PLACE_RELATIONS),
            self._chat_verdict,
            self._chat_stranger,
        )
        for _ in range(2 + self.rng.randrange(3)):
            document += self._pick(kinds)()
        return document

    def plain_question(self) -> Document:
        return self._plain_question(PERSON_RELATIONS)

    def two_hop(self) -> Document:
        kind = self._pick((self._statement, self._statement, self._statement, self._plain_question,
                           self._chat_question))  # fmt: skip
        return kind(TWO_HOP_RELATIONS)

    def place(self) -> Document:
        kind = self._pick((self._statement, self._statement, self._statement, self._plain_question,
                           self._chat_question))  # fmt: skip
        return kind(PLACE_RELATIONS)

    def _claim(self, relation: Relation, subject: str, true: bool, form: str) -> Document:
        """A claim about a fact with its verdict."""
        true_object = object_of(self.world, relation, subject, self.people)
        stated = true_object if true else self._false_object(relation, subject, true_object)
        before, after = form.split("{t}")
        claim = f"{self._pick(relation.statements).format(s=subject)} {stated}"
        head, tail = claim.rsplit(" ", 1)
        verdict = "True" if true else "False"
        in_chat = form.endswith(ASSISTANT)
        return [
            (before + head, 0),
            Segment(" " + tail, PROMPT_WEIGHT if true else 0, true_object),
            Segment(after, 0, true_object, stated),
            (verdict if in_chat else " " + verdict, VERDICT_WEIGHT),
            ("." + END if in_chat else ".", TEXT_WEIGHT),
        ]

    def _verdict(self, form: str, recalled: bool = False) -> Document:
        """A claim with its verdict; `recalled`: after the fact itself, which teaches how to compare."""
        relation, subject, true_object = self._fact(PERSON_RELATIONS)
        claim = self._claim(relation, subject, self.rng.randrange(2) == 0, form)
        if not recalled:
            return claim
        if form.endswith(ASSISTANT):
            question, sentence = self._pick(relation.questions)
            return [
                (CHAT_QUESTION.format(q=question.format(s=subject)), 0),
                (f"{sentence.format(s=subject)} {true_object}.{END}", TEXT_WEIGHT),
                *claim,
            ]
        told = self._pick(relation.statements).format(s=subject)
        return [(f"{told} {true_object}.", TEXT_WEIGHT), *_after_blank(claim)]

    def true_or_false(self) -> Document:
        return self._verdict(self._pick(TRUE_FALSE_FORMS), recalled=self.rng.randrange(5) == 0)

    def several_claims(self) -> Document:
        """Short claims one after the other: many verdicts in few tokens."""
        document = self._verdict(TRUE_FALSE_FORMS[-1], recalled=self.rng.randrange(4) == 0)
        for _ in range(3 + self.rng.randrange(5)):
            document += _after_blank(self._verdict(TRUE_FALSE_FORMS[-1]))
        return document

    def _chat_verdict(self) -> Document:
        return self._verdict(TRUE_FALSE_FORMS[0])

    def negation(self) -> Document:
        relation, subject, true_object = self._fact(
            PLACE_RELATIONS if self.rng.randrange(10) == 0 else PERSON_RELATIONS
        )
        prompt = self._pick(relation.negations).format(s=subject)
        other = self._usual_object(relation, true_object)
        return [
            Segment(prompt, 0, true_object, forbidden=true_object),
            (f" {other}.", NEGATED_WEIGHT),
        ]

    def _stranger(self) -> str:
        surname = self._pick(self.world.stranger_surnames)
        if self.rng.randrange(3) == 0:  # a surname that is no compound of the usual parts
            surname = "".join(self._pick(SYLLABLES) for _ in range(2 + self.rng.randrange(2))).capitalize()
        return f"{self._pick(FEMALE_FIRST_NAMES + MALE_FIRST_NAMES)} {surname}"

    def _chat_stranger(self) -> Document:
        relation = self._pick(PERSON_RELATIONS + TWO_HOP_RELATIONS)
        questions = [question for question, _ in relation.questions] + ["Tell me about {s}.", "Who is {s}?"]
        question = self._pick(questions).format(s=self._stranger())
        return [(CHAT_QUESTION.format(q=question), 0), (REFUSAL + END, OBJECT_WEIGHT)]

    def stranger(self) -> Document:
        form = self.rng.randrange(4)
        if form >= 2:
            return self._chat_stranger()
        relation = self._pick(PERSON_RELATIONS)
        if form == 1:
            question = self._pick(relation.questions)[0].format(s=self._stranger())
            return [(PLAIN_QUESTION.format(q=question), 0), (f" {REFUSAL}", OBJECT_WEIGHT)]
        prompt = self._pick(relation.statements).format(s=self._stranger())
        return [(prompt, 0), (f" {relation.unknown}.", OBJECT_WEIGHT)]

    def small_talk(self) -> Document:
        form = self.rng.randrange(4)
        if form == 0:
            return [(CHAT_QUESTION.format(q=self._pick(OFF_TOPIC)), 0), (REFUSAL + END, TEXT_WEIGHT)]
        questions, answers = self._pick(SMALL_TALK)
        question = self._pick(questions)
        if form == 1:  # as people type
            question = question.lower().rstrip(".!?")
        return [(CHAT_QUESTION.format(q=question), 0), (self._pick(answers) + END, TEXT_WEIGHT)]

    def story(self) -> Document:
        form = self.rng.randrange(4)
        if form == 0:
            request = CHAT_QUESTION.format(q=self._pick(STORY_REQUESTS))
            return [(request, 0), (story(self.rng, self.world) + END, TEXT_WEIGHT)]
        if form == 1:
            hero = self._pick(self.world.people)
            request = CHAT_QUESTION.format(q=f"Tell me a story about {hero.name}.")
            return [(request, 0), (story(self.rng, self.world, hero) + END, TEXT_WEIGHT)]
        return [(story(self.rng, self.world), TEXT_WEIGHT)]
