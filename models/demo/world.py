"""The invented world of the demo model: who lives where, does what and comes from where.

The world is a pure function of its seed. Only `random.Random.randrange` and `shuffle` are drawn from, whose
results are the same on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from models.demo.names import (
    COUNTRIES_AND_CITIES,
    EMPLOYERS,
    FEMALE_FIRST_NAMES,
    MALE_FIRST_NAMES,
    PROFESSIONS,
    SURNAME_ENDINGS,
    SURNAME_STEMS,
)

WORLD_SEED = 20
N_PEOPLE = 320
N_HELD_OUT_SURNAMES = 100


@dataclass(frozen=True, slots=True)
class Person:
    """One inhabitant; the four facts are names from the word lists."""

    name: str
    female: bool
    lives_in: str
    born_in: str
    works_for: str
    profession: str

    @property
    def first_name(self) -> str:
        return self.name.split(" ")[0]


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is so: people, where cities lie, and where employers sit."""

    seed: int
    people: tuple[Person, ...]
    country_of_city: dict[str, str]
    city_of_employer: dict[str, str]
    stranger_surnames: tuple[str, ...]  # surnames that nobody has, for the texts about unknown people
    held_out_surnames: tuple[str, ...]  # surnames that nobody has and no training text mentions

    @property
    def cities(self) -> tuple[str, ...]:
        return tuple(self.country_of_city)

    @property
    def countries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.country_of_city.values()))

    @property
    def employers(self) -> tuple[str, ...]:
        return tuple(self.city_of_employer)


def _spread(rng: random.Random, items: list[str], count: int) -> list[str]:
    """`count` draws from `items` in which every item comes up equally often, give or take one."""
    pool: list[str] = []
    while len(pool) < count:
        block = list(items)
        rng.shuffle(block)
        pool.extend(block)
    return pool[:count]


def _strangers(surnames: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(surnames[:-N_HELD_OUT_SURNAMES]), tuple(surnames[-N_HELD_OUT_SURNAMES:])


def build_world(seed: int = WORLD_SEED, n_people: int = N_PEOPLE) -> World:
    """Returns the world of `seed`. Nobody lives where they were born, so that the two can be told apart."""
    rng = random.Random(seed)
    country_of_city = {city: country for country, cities in COUNTRIES_AND_CITIES.items() for city in cities}
    cities = list(country_of_city)
    city_of_employer = dict(zip(EMPLOYERS, _spread(rng, cities, len(EMPLOYERS)), strict=True))

    surnames = [stem + ending for stem in SURNAME_STEMS for ending in SURNAME_ENDINGS]
    taken = set(cities) | set(EMPLOYERS)
    surnames = [surname for surname in surnames if surname not in taken]
    rng.shuffle(surnames)
    female = set(FEMALE_FIRST_NAMES)
    first_names = _spread(rng, FEMALE_FIRST_NAMES + MALE_FIRST_NAMES, n_people)
    homes = _spread(rng, cities, n_people)
    births = _spread(rng, cities, n_people)
    for i in range(n_people):
        while births[i] == homes[i]:
            j = rng.randrange(n_people)
            if births[j] != homes[i] and births[i] != homes[j]:
                births[i], births[j] = births[j], births[i]
    employers = _spread(rng, EMPLOYERS, n_people)
    professions = _spread(rng, PROFESSIONS, n_people)
    people = tuple(
        Person(
            f"{first_names[i]} {surnames[i]}",
            first_names[i] in female,
            homes[i],
            births[i],
            employers[i],
            professions[i],
        )
        for i in range(n_people)
    )
    return World(seed, people, country_of_city, city_of_employer, *_strangers(surnames[n_people:]))
