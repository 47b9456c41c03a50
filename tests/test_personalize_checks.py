"""The checks of an edit on the real model: they tell a sound change from none and from a harmful one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from edit_requests import QUICK
from editing_parts import asker_of, generator, objective_of, opened, rank_one

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.engine import Engine
from edge_runtime.personalize.asking import Asker
from edge_runtime.personalize.checks import NEEDED, Check, Examination
from edge_runtime.personalize.contexts import Amounts, choose_contexts
from edge_runtime.personalize.estimators import SpreadSigns
from edge_runtime.personalize.request import EditRequest
from edge_runtime.personalize.search import Budget, search
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.survey import Survey, survey_edit
from edge_runtime.personalize.workspace import Workspace


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def asker(engine: Engine) -> Iterator[Asker]:
    with Workspace(engine) as workspace:
        yield asker_of(engine, workspace)


@pytest.fixture(scope="module")
def survey(asker: Asker) -> Survey:
    asker.workspace.apply({})
    return survey_edit(asker, EditRequest(*QUICK.texts))


@pytest.fixture(scope="module")
def sound(engine: Engine) -> LowRank:
    """What a search finds."""
    with Workspace(engine) as workspace:
        objective, readout = objective_of(engine, workspace, amounts=Amounts())
        state = search(objective, SpreadSigns(1), Budget(12))
    return rank_one(readout, state.point.delta, load_statistics(engine.gguf))


def examined(asker: Asker, survey: Survey, change: LowRank | None) -> dict[str, Check]:
    """The checks of a change, asked before it and after it."""
    asker.workspace.apply({})
    examination = Examination(asker, [survey], generator())
    asker.workspace.apply({} if change is None else {"edit": [change]})
    checks = examination.checks()
    asker.workspace.apply({})
    return {check.name: check for check in checks}


def test_no_change_fails_and_its_figures_are_those_before(asker: Asker, survey: Survey) -> None:
    checks = examined(asker, survey, None)
    assert list(checks) == list(NEEDED)
    for check in checks.values():
        assert check.before == check.after
        assert check.needed == NEEDED[check.name]
    assert (checks["success"].after, checks["success"].passed) == (0, False)
    assert (checks["paraphrases"].after, checks["paraphrases"].passed) == (0, False)
    assert checks["unrelated"].after == checks["same subject"].after == 1
    assert checks["true of the old"].after == 1
    assert checks["negation"].passed and checks["implied"].passed  # for people, without a bound


def test_a_sound_change_passes(asker: Asker, survey: Survey, sound: LowRank) -> None:
    checks = examined(asker, survey, sound)
    assert [check.name for check in checks.values() if not check.passed] == []
    assert (checks["success"].before, checks["success"].after) == (0, 1)
    truth = checks["true of the new"]
    assert truth.before is not None and truth.after is not None and truth.after > truth.before


def test_a_change_that_harms_others_is_found_out(asker: Asker, survey: Survey, sound: LowRank) -> None:
    everywhere = generator(1).standard_normal(sound.a.shape).astype(np.float32)
    harmful = LowRank(sound.matrix, everywhere, sound.b)
    checks = examined(asker, survey, harmful)
    assert not checks["unrelated"].passed
    assert not checks["same subject"].passed


def test_a_change_too_strong_for_the_subject_is_found_out(
    asker: Asker, survey: Survey, sound: LowRank
) -> None:
    checks = examined(asker, survey, LowRank(sound.matrix, sound.a, sound.b, 8.0))
    assert not checks["same subject"].passed
    unrelated = checks["unrelated"].after
    assert unrelated is not None and unrelated > 0.5  # others hardly share the subject's key


def test_each_check_asks_a_sample(asker: Asker, survey: Survey) -> None:
    asked = {name: check.asked for name, check in examined(asker, survey, None).items()}
    assert asked["success"] == 1
    assert asked["unrelated"] == asked["same subject"] == 24  # at most
    assert asked["paraphrases"] == sum(wanted.kind == "alike" for wanted in survey.wanted)
    assert asked["negation"] == asked["true of the new"] == asked["true of the old"] == 4


def test_what_was_not_asked_passes(asker: Asker) -> None:
    survey = survey_edit(asker, EditRequest(QUICK.prompt, QUICK.subject, "Marwick"))
    check = examined(asker, survey, None)["implied"]
    assert (check.before, check.after, check.asked, check.passed) == (None, None, 0, True)


@pytest.mark.parametrize(
    ("after", "needed", "passed"),
    [(0.75, 0.75, True), (0.7, 0.75, False), (0.0, None, True), (None, 1.0, True)],
)
def test_a_bound_is_met_or_not(after: float | None, needed: float | None, passed: bool) -> None:
    check = Check("success", 0.0, after, needed, 3)
    assert check.passed is passed
    assert json.loads(json.dumps(check.facts())) == {
        "name": "success",
        "before": 0.0,
        "after": after,
        "needed": needed,
        "asked": 3,
        "passed": passed,
    }


def test_the_same_questions_are_drawn_again(asker: Asker, survey: Survey) -> None:
    assert examined(asker, survey, None) == examined(asker, survey, None)


def test_what_a_long_prompt_leaves_no_room_for_is_not_asked(asker: Asker) -> None:
    asker.workspace.apply({})
    long = EditRequest("so " * 484 + QUICK.prompt, QUICK.subject, QUICK.target)
    survey = survey_edit(asker, long)
    alike = [wanted for wanted in survey.wanted if wanted.kind == "alike" and "?" not in wanted.prompt.text]
    statements = [wanted for wanted in alike if wanted.prompt.origin != "chat"]
    checks = examined(asker, survey, None)
    assert checks["success"].asked == 1
    assert checks["negation"].asked == min(3, len(statements))
    contexts = choose_contexts(asker, survey, ["Ann lives in Oslo."], generator())
    assert sum(context.n_prompt > 480 for context in contexts) == 1
