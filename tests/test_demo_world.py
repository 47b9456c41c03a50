"""The invented world, its texts and facts.json; no model is loaded."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from models.demo.corpus import Corpus
from models.demo.facts import FACTS_PATH, HELD_OUT_PATH, Facts, load_facts
from models.demo.relations import BOS, EOS, REFUSAL, RELATIONS
from models.demo.world import World, build_world
from models.demo.write_facts import facts_text, held_out_text


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts()


def documents(world: World, seed: int, count: int) -> list[str]:
    return [
        "".join(text for text, *_ in document) for document in itertools.islice(Corpus(world, seed), count)
    ]


def test_same_seed_gives_the_same_world_and_another_seed_another(world: World) -> None:
    assert build_world() == world
    assert build_world(world.seed + 1).people != world.people


def test_same_seed_gives_the_same_documents(world: World) -> None:
    assert documents(world, 3, 200) == documents(world, 3, 200)
    assert documents(world, 3, 200) != documents(world, 4, 200)


def test_shipped_facts_are_those_of_the_generator(world: World) -> None:
    assert FACTS_PATH.read_text(encoding="utf-8") == facts_text(world)


def test_shipped_held_out_text_is_that_of_the_generator(world: World) -> None:
    assert HELD_OUT_PATH.read_text(encoding="utf-8") == held_out_text(world)


def test_facts_file_is_small() -> None:
    assert FACTS_PATH.stat().st_size < 1_000_000


def test_names_are_unique_and_surnames_tell_people_apart(world: World) -> None:
    assert len(world.people) >= 300
    assert len({person.name for person in world.people}) == len(world.people)
    surnames = {person.name.split(" ")[1] for person in world.people}
    assert len(surnames) == len(world.people)
    assert not surnames & (set(world.stranger_surnames) | set(world.held_out_surnames))


def test_birthplace_differs_from_home(world: World) -> None:
    assert all(person.lives_in != person.born_in for person in world.people)


@pytest.mark.parametrize("attribute", ["lives_in", "born_in", "works_for", "profession"])
def test_objects_are_spread_evenly_over_people(world: World, attribute: str) -> None:
    counts = Counter(getattr(person, attribute) for person in world.people)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_single_hop_relation_has_at_least_six_phrasings() -> None:
    for relation in RELATIONS:
        if relation.hops == 1:
            assert len(set(relation.statements)) >= 6, relation.name
            assert len(set(relation.questions)) >= 3, relation.name
            assert len(set(relation.negations)) >= 2, relation.name


def test_no_two_relations_share_a_prompt(facts: Facts) -> None:
    owner: dict[str, tuple[str, str]] = {}
    for fact in facts.all_facts():
        for text in {prompt.text for prompt in fact.prompts()}:
            assert owner.setdefault(text, (fact.relation, fact.subject)) == (fact.relation, fact.subject)


def test_two_hop_answers_follow_from_single_facts(facts: Facts) -> None:
    for person in facts.people:
        home = facts.fact("lives_in", person).object
        assert facts.fact("home_country", person).object == facts.fact("located_in", home).object
        employer = facts.fact("works_for", person).object
        assert facts.fact("work_city", person).object == facts.fact("based_in", employer).object


def test_candidates_hold_every_object(facts: Facts) -> None:
    for fact in facts.all_facts():
        assert fact.object in facts.candidates(fact.relation)


def test_verdicts_follow_the_stated_object(facts: Facts) -> None:
    fact = facts.fact("lives_in", facts.people[0])
    false = facts.false_objects(fact)
    assert false and fact.object not in false
    assert {prompt.answer.strip() for prompt in fact.true_or_false()} == {"True."}
    assert {prompt.answer.strip() for prompt in fact.true_or_false(false[0])} == {"False."}


def test_replaced_fact_answers_with_the_new_object(facts: Facts) -> None:
    fact = facts.fact("works_for", facts.people[5])
    other = next(name for name in facts.candidates("works_for") if name != fact.object)
    edited = fact.replaced(other)
    assert all(prompt.answer.endswith(f" {other}.") for prompt in edited.prompts())
    assert edited.true_or_false()[0].answer == "True."
    assert edited.true_or_false(fact.object)[0].answer == "False."


def test_unknown_relation_or_subject_raises_key_error(facts: Facts) -> None:
    with pytest.raises(KeyError):
        facts.fact("lives_in", "Nobody Nowhere")
    with pytest.raises(KeyError):
        facts.fact("dreams_of", facts.people[0])


def test_true_and_false_statements_are_balanced_and_held_out_ones_never_appear(
    world: World, facts: Facts
) -> None:
    verdicts: Counter[bool] = Counter()
    held_out = {
        f"{template.format(s=fact.subject)} {stated}."
        for fact in facts.all_facts(hops=1, subject_type="person")
        for template in fact.wording.statements
        for stated in facts.false_objects(fact)
    }
    for text in documents(world, 7, 6000):
        if "rue or false" in text:
            asked = text.split("rue or false", 1)[1]
            statement = asked.removeprefix(": ").removeprefix("? ").split(".", 1)[0] + "."
            verdicts["True." in asked] += 1
            assert statement not in held_out
    assert 0.4 < verdicts[True] / verdicts.total() < 0.6
    assert verdicts.total() > 500


def test_negated_statements_never_name_the_true_object(world: World, facts: Facts) -> None:
    forbidden = {
        prompt.text + prompt.answer for fact in facts.all_facts(hops=1) for prompt in fact.negations()
    }
    negated = [
        text.removeprefix(BOS).removesuffix(EOS) for text in documents(world, 8, 6000) if " not " in text
    ]
    assert negated and not forbidden & set(negated)


def test_strangers_appear_in_no_training_text(world: World, facts: Facts) -> None:
    text = "\n".join(documents(world, 9, 6000))
    assert REFUSAL in text
    assert not any(f" {surname}" in text for surname in world.held_out_surnames)
    assert {name.split(" ")[1] for name in facts.strangers} <= set(world.held_out_surnames)


def test_held_out_stories_are_no_training_documents(world: World) -> None:
    held_out = HELD_OUT_PATH.read_text(encoding="utf-8").splitlines()
    assert not set(held_out) & {
        text.removeprefix(BOS).removesuffix(EOS) for text in documents(world, 1, 20_000)
    }


def test_facts_file_tells_special_tokens_and_template() -> None:
    document = json.loads(FACTS_PATH.read_text(encoding="utf-8"))
    assert document["special_tokens"]["end"] in document["chat_template"]
