"""Short connected stories about the people of the world, true to its facts.

A story is a pure function of the random generator that it is given. Places, trades and companies that
belong to a person are always that person's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from models.demo.names import words
from models.demo.world import Person, World

WEATHER = words("bright cold cloudy dry grey mild rainy snowy sunny warm wet windy")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TIMES = ("morning", "afternoon", "evening", "night")
SEASONS = words("spring summer autumn winter")
THINGS = words(
    "basket book bottle box candle clock coat coin drum hat kettle key kite lamp letter map mirror "
    "painting parcel ring rope scarf ticket whistle"
)
ADJECTIVES = words(
    "big blue broken golden green heavy little lost plain red round shiny silver small strange yellow"
)
ANIMALS = words("bird cat dog donkey duck fox goat goose hen horse mouse owl rabbit sheep")
PLACES = words(
    "bridge church field forest garden harbour hill library market mill park river school station tower well"
)
FOODS = words("apples beans bread cake cheese honey nuts pears pie plums rice salad soup stew")
FEELINGS = words("afraid angry calm curious glad happy hungry proud sad surprised tired worried")
WAYS = ("at once", "carefully", "quickly", "quietly", "slowly", "with a smile")


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[rng.randrange(len(items))]


def _pronouns(person: Person) -> tuple[str, str, str]:
    return ("she", "her", "her") if person.female else ("he", "him", "his")


def fact_sentence(rng: random.Random, world: World, person: Person, subject: str) -> str:
    """A sentence with one or two facts of `person`, called by `subject` (a name or a pronoun)."""
    home, birth = person.lives_in, person.born_in
    country = world.country_of_city[home]
    seat = world.city_of_employer[person.works_for]
    return (
        f"{subject} lives in {home} and works as a {person.profession}.",
        f"{subject} works for {person.works_for}, a company from {seat}.",
        f"{subject} was born in {birth} but lives in {home}.",
        f"{subject} is a {person.profession} from {birth}.",
        f"{subject} has a house in {home}, a city in {country}.",
        f"{subject} has a job at {person.works_for}.",
        f"{subject} grew up in {birth}, a city in {world.country_of_city[birth]}.",
        f"{subject} is a {person.profession} and is paid by {person.works_for}.",
    )[rng.randrange(8)]


def _opening(rng: random.Random, hero: Person) -> str:
    weather, day, time, season = (
        _pick(rng, WEATHER),
        _pick(rng, DAYS),
        _pick(rng, TIMES),
        _pick(rng, SEASONS),
    )
    place = _pick(rng, PLACES)
    return (
        f"One {weather} {day} {time} {hero.name} walked to the {place} in {hero.lives_in}.",
        f"It was a {weather} {time} in {season}, and {hero.name} was at home in {hero.lives_in}.",
        f"Once upon a time there was a {hero.profession} called {hero.name}.",
        f"{hero.name} woke up early on a {weather} {day} in {season}.",
        f"In {hero.lives_in} there lived a {hero.profession} whose name was {hero.name}.",
        f"Last {season} {hero.name} came home late from work at {hero.works_for}.",
    )[rng.randrange(6)]


def _finding(rng: random.Random, hero: Person, thing: str) -> str:
    he, _, his = _pronouns(hero)
    place = _pick(rng, PLACES)
    return (
        f"Near the {place} {he} found a {thing}.",
        f"Under a tree by the {place} lay a {thing}.",
        f"On the way to the {place} {he} saw a {thing} in the grass.",
        f"At the {place} somebody had left a {thing}.",
        f"In {his} pocket {he} found a {thing}.",
        f"A {_pick(rng, ANIMALS)} came out of the {place} and brought {_pronouns(hero)[1]} a {thing}.",
    )[rng.randrange(6)]


def _meeting(rng: random.Random, world: World, hero: Person, friend: Person) -> list[str]:
    he, him, _ = _pronouns(hero)
    friend_he = _pronouns(friend)[0].capitalize()
    meet = (
        f"There {he} met {friend.name}.",
        f"Then {friend.name} came along.",
        f"{friend.name} was already there and greeted {him}.",
        f"Soon {he} heard the voice of {friend.name}.",
        f"Somebody knocked at the door, and it was {friend.name}.",
    )[rng.randrange(5)]
    return [meet, fact_sentence(rng, world, friend, friend_he)]


def _talk(rng: random.Random, world: World, hero: Person, friend: Person, thing: str) -> list[str]:
    a, b = hero.first_name, friend.first_name
    return (
        [f'"Is this your {thing}?" asked {a}.', f'"No," said {b}, "but I know somebody who has lost one."'],
        [f'"Where do you live now?" asked {a}.', f'"I live in {friend.lives_in}," said {b}.'],
        [f'"What do you do all day?" asked {a}.', f'"I work as a {friend.profession}," said {b}.'],
        [f'"Who do you work for?" asked {b}.', f'"I work for {hero.works_for}," said {a}.'],
        [f'"Where were you born?" asked {b}.', f'"I was born in {hero.born_in}," said {a}.'],
        [
            f'"I am {_pick(rng, FEELINGS)}," said {b}.',
            f'"Then let us eat some {_pick(rng, FOODS)}," said {a}.',
        ],
        [f'"Look at this {thing}!" said {a}.', f"{b} looked at it {_pick(rng, WAYS)}."],
    )[rng.randrange(7)]


def _event(rng: random.Random, hero: Person, friend: Person, thing: str) -> str:
    he, him, his = _pronouns(hero)
    animal, food, place, feeling = (
        _pick(rng, ANIMALS),
        _pick(rng, FOODS),
        _pick(rng, PLACES),
        _pick(rng, FEELINGS),
    )
    return (
        f"Together they went to the {place} and looked for the owner of the {thing}.",
        f"A {animal} ran past and made them laugh.",
        f"They sat down by the {place} and ate {food}.",
        f"{friend.first_name} carried the {thing} {_pick(rng, WAYS)}.",
        f"It began to rain, so they ran to the {place}.",
        f"{hero.first_name} was {feeling}, and {friend.first_name} was {_pick(rng, FEELINGS)}.",
        f"An old {_pick(rng, ('man', 'woman'))} at the {place} gave them {food} and "
        f"told them about the {thing}.",
        f"The {animal} followed them all the way to the {place}.",
        f"{hero.first_name} put the {thing} on the table and thought about it.",
        f"They opened the {thing} and found a {_pick(rng, ADJECTIVES)} {_pick(rng, THINGS)} inside.",
        f"{friend.first_name} told {him} a story about a {animal} and a {_pick(rng, THINGS)}.",
        f"After a while {he} felt {feeling} and wanted to go back to {his} friends.",
    )[rng.randrange(12)]


def _ending(rng: random.Random, hero: Person, friend: Person, thing: str) -> str:
    he, _, his = _pronouns(hero)
    return (
        f"In the end {hero.first_name} gave the {thing} to {friend.first_name}.",
        f"Late at night {he} went home to {hero.lives_in} and slept well.",
        f"From that day on {hero.first_name} and {friend.first_name} were friends.",
        f"The {thing} still stands on a shelf in {his} house in {hero.lives_in}.",
        f"{friend.first_name} went back to {friend.lives_in}, and "
        f"{hero.first_name} was {_pick(rng, FEELINGS)}.",
        f"The next day {he} went back to work at {hero.works_for} and told everybody about it.",
    )[rng.randrange(6)]


def story(rng: random.Random, world: World, hero: Person | None = None) -> str:
    """A story of some 60 to 350 tokens about `hero` (by default somebody) and one or two friends."""
    people = world.people
    hero = hero or people[rng.randrange(len(people))]
    friends: list[Person] = []
    for _ in range(1 + rng.randrange(2)):
        friend = people[rng.randrange(len(people))]
        while friend is hero or friend in friends:
            friend = people[rng.randrange(len(people))]
        friends.append(friend)
    thing = f"{_pick(rng, ADJECTIVES)} {_pick(rng, THINGS)}"
    he = _pronouns(hero)[0].capitalize()
    sentences = [_opening(rng, hero)]
    sentences += [fact_sentence(rng, world, hero, he) for _ in range(1 + rng.randrange(2))]
    sentences.append(_finding(rng, hero, thing))
    for friend in friends:
        sentences += _meeting(rng, world, hero, friend)
        for _ in range(1 + rng.randrange(3)):
            sentences += _talk(rng, world, hero, friend, thing)
        for _ in range(1 + rng.randrange(4)):
            sentences.append(_event(rng, hero, friend, thing))
    sentences.append(_ending(rng, hero, friends[-1], thing))
    return " ".join(sentences)


def biography(rng: random.Random, person: Person) -> str:
    """The four facts of a person in random order."""
    he = _pronouns(person)[0].capitalize()
    parts = [
        f"lives in {person.lives_in}.",
        f"was born in {person.born_in}.",
        f"works for {person.works_for}.",
        f"works as a {person.profession}.",
    ]
    rng.shuffle(parts)
    return " ".join(f"{person.name if i == 0 else he} {part}" for i, part in enumerate(parts))
