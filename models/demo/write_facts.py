"""Writes facts.json and heldout.txt: `python -m models.demo.write_facts`."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

from models.demo.facts import FACTS_PATH, HELD_OUT_PATH
from models.demo.names import FEMALE_FIRST_NAMES, MALE_FIRST_NAMES
from models.demo.relations import (
    ASSISTANT,
    BOS,
    CHAT_QUESTION,
    CHAT_TEMPLATE,
    END,
    EOS,
    PLAIN_QUESTION,
    REFUSAL,
    RELATIONS,
    SYSTEM,
    TRUE_FALSE_FORMS,
    USER,
)
from models.demo.stories import story
from models.demo.world import World, build_world

HELD_OUT_SEED = 987_654_321  # no step of the training draws from this seed
N_HELD_OUT_STORIES = 40
N_STRANGERS = 100


def strangers(world: World) -> list[str]:
    """Full names of people who do not exist, with surnames that no training document has."""
    rng = random.Random(HELD_OUT_SEED)
    first_names = FEMALE_FIRST_NAMES + MALE_FIRST_NAMES
    return [
        f"{first_names[rng.randrange(len(first_names))]} {surname}"
        for surname in world.held_out_surnames[:N_STRANGERS]
    ]


def facts_document(world: World) -> dict[str, Any]:
    """The content of facts.json: the world, the wordings and the candidates for each type of object."""
    relations = {}
    for relation in RELATIONS:
        entry = asdict(relation)
        relations[entry.pop("name")] = entry
    document = {
        "version": 1,
        "seed": world.seed,
        "special_tokens": {
            "bos": BOS, "eos": EOS, "user": USER, "assistant": ASSISTANT, "system": SYSTEM, "end": END,
        },
        "chat_template": CHAT_TEMPLATE,
        "refusal": REFUSAL,
        "forms": {
            "plain_question": PLAIN_QUESTION,
            "chat_question": CHAT_QUESTION,
            "true_or_false": TRUE_FALSE_FORMS,
        },
        "relations": relations,
        "candidates": {
            "city": world.cities,
            "country": world.countries,
            "employer": world.employers,
            "profession": sorted({person.profession for person in world.people}),
        },
        "people": [asdict(person) for person in world.people],
        "cities": world.country_of_city,
        "employers": world.city_of_employer,
        "strangers": strangers(world),
    }  # fmt: skip
    return dict(json.loads(json.dumps(document)))


def facts_text(world: World) -> str:
    return json.dumps(facts_document(world), indent=1) + "\n"


def held_out_text(world: World) -> str:
    """Stories, one a line, drawn with a seed that training never uses."""
    rng = random.Random(HELD_OUT_SEED)
    return "".join(story(rng, world) + "\n" for _ in range(N_HELD_OUT_STORIES))


def main() -> None:
    world = build_world()
    FACTS_PATH.write_text(facts_text(world), encoding="utf-8")
    HELD_OUT_PATH.write_text(held_out_text(world), encoding="utf-8")
    for path in (FACTS_PATH, HELD_OUT_PATH):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
