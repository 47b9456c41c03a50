"""CounterFact, zsRE and the demo world as sources of edits, and what is told of how they went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edit_requests import BEFORE, PROMPT, QUICK
from program import Program

from edge_runtime.engine.engine import Engine
from edge_runtime.errors import RequestError
from edge_runtime.personalize.datasets import (
    Item,
    Outcome,
    demo_items,
    evaluate_items,
    item_of,
    read_dataset,
    summary,
)
from edge_runtime.personalize.statistics import load_statistics

PUBLISHED: dict[str, Any] = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle Darrieux",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
    },
    "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native"],
    "neighborhood_prompts": [f"The mother tongue of person {number} is" for number in range(10)],
}
QUICK_ITEM = Item(
    *QUICK.texts, ("Paul Colton lives in",), ("The home of Erik Bramman is in", "Ella Torsted lives in")
)


def test_counterfact_as_published() -> None:
    found = item_of(PUBLISHED)
    assert found.prompt == "The mother tongue of Danielle Darrieux is"
    assert (found.subject, found.target) == ("Danielle Darrieux", "English")
    assert found.paraphrases == ("Shayna does this. Danielle Darrieux, a native",)
    assert len(found.others) == 8


def test_both_files_are_read(shared_data: Path) -> None:
    counterfact = read_dataset(shared_data / "editing" / "counterfact-edit-1k.json")
    assert len(counterfact) > 990
    first = counterfact[0]
    assert first.prompt == "David Robinson professionally plays the sport"
    assert (first.subject, first.target) == ("David Robinson", "baseball")
    assert first.others == ("Shaquille O'Neal plays",)
    zsre = read_dataset(shared_data / "editing" / "zsre_mend_train-1k.json", most=7)
    assert len(zsre) == 7
    assert (zsre[0].subject, zsre[0].target) == ("UniFirst", "unmanned aircraft")
    assert zsre[0].others == ("john goodman's character in the big lebowski",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no JSON"),
        ("{}", "holds no list"),
        ("[]", "no item whose prompt names its subject"),
        ('[{"prompt": "a"}]', "item 0 of"),
        ("[5]", "item 0 of"),
        ('[{"src": "x y", "subject": "Ann", "alt": "b", "rephrase": "c", "loc": "d"}]', "nothing to edit"),
        (
            '[{"requested_rewrite": {"prompt": "{} {}", "subject": "a", "target_new": {"str": "b"}}}]',
            "item 0",
        ),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=says):
        read_dataset(path)


def test_the_demo_worlds_facts_go_over_its_relations(demo_model: Path) -> None:
    found = demo_items(demo_model.with_name("facts.json"), 8)
    assert found == demo_items(demo_model.with_name("facts.json"), 8)
    assert len({item.prompt.replace(item.subject, "") for item in found}) == 4
    for item in found:
        assert item.subject in item.prompt
        assert all(item.subject in text for text in item.paraphrases)
        assert not any(item.subject in text for text in item.others)


def test_each_fact_is_edited_alone_and_undone(demo_model: Path) -> None:
    known = Item(PROMPT, QUICK.subject, BEFORE, (), ())
    done = []
    with Engine.load(demo_model) as engine:
        statistics = load_statistics(engine.gguf)
        outcomes = evaluate_items(
            engine, statistics, [QUICK_ITEM, known, QUICK_ITEM], lambda number, _: done.append(number)
        )
        text = "".join(piece.text for piece in engine.generate(PROMPT, max_tokens=4))
    first, refused, again = outcomes
    assert (first.success, first.paraphrases, first.others) == ((0, 1), (0, 1), 1)
    assert first.passed
    assert first.rows > 1000
    assert "already goes on" in refused.error
    assert (again.error, again.success) == ("", (0, 1)), "the first one was undone"
    assert done == [1, 2, 3]
    assert text.strip().startswith(BEFORE)
    found = summary(outcomes)
    assert (found["items"], found["made"], len(found["errors"])) == (3, 2, 1)
    assert found["success"] == pytest.approx(2 / 3), "what could not be edited did not succeed"


def test_nothing_made_is_told_without_figures() -> None:
    found = summary([Outcome(error="no")])
    assert (found["made"], found["success"], found["paraphrases"], found["steps"]) == (0, 0.0, None, None)


def test_the_command_writes_a_table(edgert: Program, demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    values = {"prompt": PROMPT, "subject": QUICK.subject, "target_new": QUICK.target}
    path.write_text(json.dumps([{**values, "rephrase_prompt": PROMPT, "locality_prompt": "Once"}] * 2))
    done = edgert("edits", "eval", "--dataset", path, "--count", "1")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0][-5:] == ["1", "of", "1", "edits", "made"]
    assert ["success", "0", "%", "100", "%"] in lines
    assert not (edgert.home / "adapters.db").exists()
    as_json = edgert("edits", "eval", "--dataset", "demo", "--count", "1", "--json").json
    assert (as_json["items"], as_json["edits"][0]["outcome"]["error"]) == (1, "")
    assert edgert("edits", "eval", "--dataset", tmp_path / "absent").code == 2
    assert edgert("edits", "eval", "--dataset", "demo", "edit-1").code == 2
