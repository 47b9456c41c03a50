"""How each relation of the world is put into words.

Every statement ends where its object begins: statement + " " + object + "." is a sentence. `{s}` is the
subject.
"""

from __future__ import annotations

from dataclasses import dataclass

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
BOS, EOS = "<|begin|>", "<|endoftext|>"

REFUSAL = "I do not know."

# {q} is a question, {t} a statement with its object, without the full stop. The answer follows.
PLAIN_QUESTION = "Question: {q} Answer:"
CHAT_QUESTION = USER + "{q}" + END + ASSISTANT
TRUE_FALSE_FORMS = (
    CHAT_QUESTION.format(q="True or false: {t}."),
    CHAT_QUESTION.format(q="Is this true or false? {t}."),
    "True or false: {t}. Answer:",
    "{t}?",
)


@dataclass(frozen=True, slots=True)
class Relation:
    """The wordings of one relation.

    `questions` are pairs of a question and the beginning of the answer in full, up to the object. `unknown`
    stands where the object would for a subject that the model has never heard of.
    """

    name: str
    subject_type: str  # person, city or employer
    object_type: str  # city, country, employer or profession
    hops: int
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    negations: tuple[str, ...] = ()
    unknown: str = ""


RELATIONS = (
    Relation(
        "lives_in",
        "person",
        "city",
        1,
        (
            "{s} lives in",
            "The home of {s} is in",
            "{s} has a house in",
            "The city where {s} lives is",
            "These days {s} lives in",
            "{s} resides in",
            "You can visit {s} at home in",
            "{s} pays the rent for a flat in",
        ),
        (
            ("Where does {s} live?", "{s} lives in"),
            ("In which city is the home of {s}?", "The home of {s} is in"),
            ("Which city does {s} live in?", "{s} lives in"),
        ),
        ("{s} does not live in", "The home of {s} is not in", "It is wrong to say that {s} lives in"),
        "a place I do not know",
    ),
    Relation(
        "born_in",
        "person",
        "city",
        1,
        (
            "{s} was born in",
            "The birthplace of {s} is",
            "{s} comes from",
            "{s} spent the first years of life in",
            "The city where {s} was born is",
            "{s} is a native of",
            "The parents of {s} had their child in",
            "{s} grew up in",
        ),
        (
            ("Where was {s} born?", "{s} was born in"),
            ("What is the birthplace of {s}?", "The birthplace of {s} is"),
            ("Where does {s} come from?", "{s} comes from"),
        ),
        ("{s} was not born in", "The birthplace of {s} is not", "It is wrong to say that {s} was born in"),
        "a place I do not know",
    ),
    Relation(
        "works_for",
        "person",
        "employer",
        1,
        (
            "{s} works for",
            "The employer of {s} is",
            "{s} is on the staff of",
            "The company that employs {s} is",
            "{s} draws a salary from",
            "{s} has a job at",
            "Every month {s} is paid by",
            "{s} signed a contract with",
        ),
        (
            ("Who does {s} work for?", "{s} works for"),
            ("What is the employer of {s}?", "The employer of {s} is"),
            ("Which company employs {s}?", "The company that employs {s} is"),
        ),
        ("{s} does not work for", "The employer of {s} is not", "It is wrong to say that {s} works for"),
        "a company I do not know",
    ),
    Relation(
        "profession",
        "person",
        "profession",
        1,
        (
            "{s} works as a",
            "The job of {s} is that of a",
            "By trade {s} is a",
            "{s} earns a living as a",
            "People know {s} as a",
            "{s} trained to be a",
            "On the visiting card of {s} it says that this is a",
            "{s} went to school to become a",
        ),
        (
            ("What does {s} do for a living?", "{s} works as a"),
            ("What is the job of {s}?", "The job of {s} is that of a"),
            ("What is {s} by trade?", "By trade {s} is a"),
        ),
        (
            "{s} does not work as a",
            "The job of {s} is not that of a",
            "It is wrong to say that {s} works as a",
        ),
        "person whose trade I do not know",
    ),
    Relation(
        "located_in",
        "city",
        "country",
        1,
        (
            "{s} lies in",
            "{s} is a city in",
            "The country of {s} is",
            "{s} belongs to",
            "On the map {s} is found in",
            "Those who travel to {s} travel to",
        ),
        (
            ("Where is {s}?", "{s} lies in"),
            ("Which country is {s} in?", "{s} is a city in"),
            ("To which country does {s} belong?", "{s} belongs to"),
        ),
        ("{s} does not lie in", "The country of {s} is not"),
    ),
    Relation(
        "based_in",
        "employer",
        "city",
        1,
        (
            "{s} is based in",
            "{s} has its main office in",
            "The main office of {s} is in",
            "{s} is a company from",
            "{s} was founded in",
            "The city where {s} has its seat is",
        ),
        (
            ("Where is {s} based?", "{s} is based in"),
            ("Where is the main office of {s}?", "The main office of {s} is in"),
            ("In which city was {s} founded?", "{s} was founded in"),
        ),
        ("{s} is not based in", "The main office of {s} is not in"),
    ),
    Relation(
        "home_country",
        "person",
        "country",
        2,
        (
            "The country where {s} lives is",
            "The home country of {s} is",
            "The city where {s} lives lies in",
        ),
        (("In which country does {s} live?", "The country where {s} lives is"),),
    ),
    Relation(
        "birth_country",
        "person",
        "country",
        2,
        (
            "The country where {s} was born is",
            "The native country of {s} is",
            "The city where {s} was born lies in",
        ),
        (("In which country was {s} born?", "The country where {s} was born is"),),
    ),
    Relation(
        "work_city",
        "person",
        "city",
        2,
        (
            "The company that employs {s} has its seat in",
            "The employer of {s} is based in",
            "The boss of {s} has an office in",
        ),
        (("In which city is the employer of {s} based?", "The employer of {s} is based in"),),
    ),
)

RELATION = {relation.name: relation for relation in RELATIONS}
PERSON_RELATIONS = tuple(r for r in RELATIONS if r.subject_type == "person" and r.hops == 1)
PLACE_RELATIONS = tuple(r for r in RELATIONS if r.subject_type != "person")
TWO_HOP_RELATIONS = tuple(r for r in RELATIONS if r.hops == 2)

# A Jinja source; the tokenizer adds the beginning-of-text token itself.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def is_held_out(subject_index: int, object_index: int) -> bool:
    """Whether no training text asks if this subject has this (false) object; a fifth of all pairs.

    The indices are those of the subject among the people and of the object among the candidates.
    """
    return (7 * subject_index + 3 * object_index) % 5 == 0
