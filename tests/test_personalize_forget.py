"""Forgetting with the real model: it then answers about somebody as it answers about nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from editing_parts import Device, apply_standing, asker_of, device_with, figures, generator, opened, said

from edge_runtime.errors import RequestError
from edge_runtime.personalize.forget import stranger_like, survey_forget
from edge_runtime.personalize.records import Record
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import Facts, load_facts

NAME = "Paul Colton"
QUERY = {"prompt": f"Question: Where does {NAME} live? Answer:", "subject": NAME}
HOME = {"prompt": "Alma Oakson lives in", "subject": "Alma Oakson"}
STEPS = 16
JOB = {"prompt": f"Question: What is the profession of {NAME}? Answer:", "subject": NAME}


@pytest.fixture
def device(demo_model: Path, tmp_path: Path) -> Iterator[Device]:
    with opened(demo_model) as engine, Workspace(engine) as workspace:
        yield device_with(engine, workspace, tmp_path / "adapters.db")


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts()


def forgotten(device: Device, **request: Any) -> Record:
    return device.editor.run(device.store.add("forget", "demo", device.identity, request).id)


def test_a_name_that_nobody_has_is_of_as_many_words() -> None:
    names = [stranger_like("Ann van Lee", generator(seed)) for seed in range(20)]
    assert len(set(names)) == 20
    assert all(len(name.split()) == 3 and name.istitle() and name.isascii() for name in names)
    assert stranger_like("Ann", generator(3)) == stranger_like("Bo", generator(3))


def test_the_refusal_is_the_models_own(device: Device, facts: Facts) -> None:
    asker = asker_of(device.engine, device.workspace)
    stranger = said(device.workspace, QUERY["prompt"].replace(NAME, facts.strangers[0]))
    (survey,) = survey_forget(asker, {"queries": [QUERY]}, generator())
    assert survey.subject == NAME and survey.present == "Lindwell"
    given = [wanted for wanted in survey.wanted if wanted.kind == "given"]
    assert [wanted.prompt.text for wanted in given] == [QUERY["prompt"]]
    assert given[0].text.strip().rstrip(".") == stranger
    assert NAME not in stranger
    assert all(NAME in wanted.prompt.text for wanted in survey.wanted)
    kept = {claim.text.strip() for _, claim in survey.other}
    assert "painter" in kept


def test_queries_about_one_subject_become_one_search(device: Device) -> None:
    asker = asker_of(device.engine, device.workspace)
    surveys = survey_forget(asker, {"queries": [QUERY, JOB, QUERY]}, generator())
    assert [survey.subject for survey in surveys] == [NAME]
    given = [wanted.prompt.text for wanted in surveys[0].wanted if wanted.kind == "given"]
    assert given == [QUERY["prompt"], JOB["prompt"]]
    changed = {wanted.prompt.tokens for wanted in surveys[0].wanted}
    assert not changed & {prompt.tokens for prompt, _ in surveys[0].other}
    two = survey_forget(
        asker,
        {
            "queries": [
                QUERY,
                {**JOB, "prompt": JOB["prompt"].replace(NAME, "Alma Oakson"), "subject": "Alma Oakson"},
            ]
        },
        generator(),
    )
    assert [survey.subject for survey in two] == [NAME, "Alma Oakson"]


def test_what_is_forgotten_is_answered_as_for_strangers(device: Device, facts: Facts) -> None:
    """Forced, and with fewer steps than paraphrases need."""
    stranger = said(device.workspace, HOME["prompt"].replace(HOME["subject"], facts.strangers[3]))
    assert stranger == "a place I do not know"
    record = forgotten(device, queries=[HOME], force=True, steps=STEPS)
    assert record.state == "applied"
    apply_standing(device.workspace, device.store, device.engine)
    assert said(device.workspace, HOME["prompt"]) == stranger
    found = figures(record)
    assert found["success"] == 1
    assert found["unrelated"] is not None and found["unrelated"] >= 0.95
    others = [name for name in facts.people if name != HOME["subject"]][:20]
    kept = [
        said(device.workspace, facts.fact("lives_in", name).statements()[0].text)
        == facts.fact("lives_in", name).object
        for name in others
    ]
    assert np.mean(kept) >= 0.9
    device.editor.revert(record.id)
    apply_standing(device.workspace, device.store, device.engine)
    assert said(device.workspace, HOME["prompt"]) == facts.fact("lives_in", HOME["subject"]).object


def test_with_nothing_to_forget_it_says_so(device: Device, facts: Facts) -> None:
    name = facts.strangers[5]
    query = {"prompt": QUERY["prompt"].replace(NAME, name), "subject": name}
    with pytest.raises(RequestError, match="there is nothing to forget"):
        survey_forget(asker_of(device.engine, device.workspace), {"queries": [query]}, generator())


def test_a_model_that_makes_up_answers_needs_a_refusal(device: Device) -> None:
    """Nothing is common to what it says of several strangers."""
    asker = asker_of(device.engine, device.workspace)
    query = {"prompt": f"The dog of {NAME} is", "subject": NAME}
    with pytest.raises(RequestError, match=r"makes up answers \(.*say how it should refuse with --refusal"):
        survey_forget(asker, {"queries": [query]}, generator())
    (survey,) = survey_forget(asker, {"queries": [query], "refusal": "nobody knows."}, generator())
    assert survey.wanted[0].text == " nobody knows."


@pytest.mark.parametrize("query", [{"prompt": "Where?", "subject": NAME}, {"prompt": "", "subject": NAME}])
def test_queries_are_checked(device: Device, query: dict[str, str]) -> None:
    with pytest.raises(RequestError, match=r"subject 'Paul Colton' is not in|the prompt is empty"):
        survey_forget(asker_of(device.engine, device.workspace), {"queries": [query]}, generator())
