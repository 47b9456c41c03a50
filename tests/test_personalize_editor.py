"""Edits of the real model in a real store: told freely, keeping the rest, together, undone exactly."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from edit_requests import BEFORE, LONG, OTHER, QUICK, Asked
from editing_parts import (
    Device,
    apply_standing,
    device_with,
    figures,
    held_out,
    opened,
    queued,
    said,
)

from edge_runtime.engine.engine import Engine
from edge_runtime.errors import AdapterNotFoundError, RequestError
from edge_runtime.personalize.editor import Editor
from edge_runtime.personalize.progress import Progress
from edge_runtime.personalize.statistics import load_statistics
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.personalize.workspace import Workspace
from models.demo.facts import Facts, load_facts

JOB = Asked("Paul Colton works as a", "Paul Colton", "barber")


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def workspace(engine: Engine) -> Iterator[Workspace]:
    with Workspace(engine) as workspace:
        yield workspace


@pytest.fixture(scope="module")
def facts() -> Facts:
    return load_facts()


@pytest.fixture(scope="module")
def edited(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three edits, two of them of one subject, made one after the other."""
    path = tmp_path_factory.mktemp("edited") / "adapters.db"
    store = AdapterStore(path)
    editor = Editor(engine, store, load_statistics(engine.gguf))
    for asked in (QUICK, OTHER, JOB):
        assert editor.run(queued(store, engine, asked)).state == "applied"
    return path


@pytest.fixture
def fresh(engine: Engine, workspace: Workspace, tmp_path: Path) -> Device:
    return device_with(engine, workspace, tmp_path / "fresh.db")


@pytest.fixture
def device(engine: Engine, workspace: Workspace, edited: Path, tmp_path: Path) -> Device:
    """With a copy of those three edits."""
    path = tmp_path / "adapters.db"
    with closing(sqlite3.connect(edited)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)
    return device_with(engine, workspace, path)


# --- what an edit does ------------------------------------------------------------------------


def test_edits_are_told_freely_and_all_of_them_stand(fresh: Device, device: Device) -> None:
    assert fresh.answers(QUICK, OTHER, JOB) == [BEFORE, "Xylotech", "painter"]
    assert device.answers(QUICK, OTHER, JOB) == ["Brenholm", "Halcyon", "barber"]


def test_other_words_for_it_follow(device: Device, facts: Facts) -> None:
    apply_standing(device.workspace, device.store, device.engine)
    fact = facts.fact("lives_in", QUICK.subject).replaced(QUICK.target)
    prompts = fact.statements() + fact.plain_questions()
    right = [said(device.workspace, prompt.text) == QUICK.target for prompt in prompts]
    assert np.mean(right) >= 0.75


def told(device: Device, facts: Facts, relation: str, names: Sequence[str]) -> list[str]:
    return [said(device.workspace, facts.fact(relation, name).statements()[0].text) for name in names]


def test_others_are_kept(fresh: Device, device: Device, facts: Facts) -> None:
    others = [name for name in facts.people if name not in (QUICK.subject, OTHER.subject)][::20]
    changed = []
    for relation in ("lives_in", "works_for", "profession"):
        apply_standing(fresh.workspace, fresh.store, fresh.engine)
        before = told(fresh, facts, relation, others)
        apply_standing(device.workspace, device.store, device.engine)
        after = told(device, facts, relation, others)
        changed += [one != other for one, other in zip(before, after, strict=True)]
    assert len(changed) > 20
    assert np.mean(changed) <= 0.05


def test_an_engines_answer_follows_the_edit(device: Device) -> None:
    """Not only the workspace in which it was made."""
    applied = device.store.applied(device.identity)
    device.engine.set_adapters(applied.changes)
    try:
        wanted = dict.fromkeys(applied.changes, 1.0)
        texts = [
            device.engine.generate(QUICK.prompt, max_tokens=8, adapters=chosen).text()
            for chosen in (wanted, {})
        ]
    finally:
        device.engine.set_adapters({})
    assert [text.split(".")[0].strip() for text in texts] == [QUICK.target, BEFORE]


def test_the_record_tells_what_was_found(device: Device) -> None:
    record = device.store.get("edit-1")
    report = record.report
    assert (record.state, report["reasons"]) == ("applied", [])
    assert json.loads(json.dumps(report)) == report
    assert 0 < report["search_rows"] < report["rows"]
    assert report["steps"] > 0 and report["seconds"] > 0
    assert report["layer"] == load_statistics(device.engine.gguf).layer
    found = {check["name"]: check for check in report["checks"]}
    assert list(found) == [
        "success",
        "paraphrases",
        "unrelated",
        "same subject",
        "implied",
        "negation",
        "true of the new",
        "true of the old",
    ]
    assert (found["success"]["before"], found["success"]["after"]) == (0, 1)
    assert found["unrelated"]["before"] == 1 and found["unrelated"]["after"] >= 0.95
    (change,) = device.store.changes(record.id)
    assert change.matrix == f"blk.{report['layer']}.ffn_down.weight"
    assert change.a.shape[0] == 1


# --- undoing ----------------------------------------------------------------------------------


def test_one_of_two_edits_of_a_subject_is_undone_and_the_other_stays(device: Device) -> None:
    before = device.store.changes(3)
    assert device.editor.revert(1).state == "reverted"
    assert device.answers(QUICK, OTHER, JOB) == [BEFORE, "Halcyon", "barber"]
    assert not np.array_equal(device.store.changes(3)[0].a, before[0].a)  # solved anew


def test_what_was_undone_or_rejected_is_applied_as_it_was_found(device: Device) -> None:
    edited, before = device.logits(), device.store.changes(3)
    rejected = device.made(Asked(OTHER.prompt, OTHER.subject, "Tidewater"), steps=1)
    assert rejected.state == "rejected"
    device.editor.revert(1)
    assert device.answers(QUICK, OTHER, JOB) == [BEFORE, "Halcyon", "barber"]
    assert device.editor.reapply(1).state == "applied"
    assert device.answers(QUICK, OTHER, JOB) == ["Brenholm", "Halcyon", "barber"]
    np.testing.assert_array_equal(device.store.changes(3)[0].a, before[0].a)
    np.testing.assert_array_equal(device.logits(), edited)
    assert device.editor.reapply(rejected.id).report == rejected.report
    assert not np.array_equal(device.logits(), edited)
    with pytest.raises(RequestError, match="is applied; only what was rejected or undone"):
        device.editor.reapply(1)


def test_what_was_found_without_an_edit_does_not_stand_with_it(device: Device) -> None:
    device.editor.revert(2)
    again = device.made(Asked(OTHER.prompt, OTHER.subject, "Tidewater"), force=True)
    with pytest.raises(RequestError, match=f"{again.name} was applied since.*{OTHER.subject}.*revert that"):
        device.editor.reapply(2)
    device.editor.revert(again.id)
    assert device.editor.reapply(2).state == "applied"


def test_all_undone_the_logits_are_the_same_bits(fresh: Device, device: Device) -> None:
    before = fresh.logits()
    edited = device.logits()
    assert not np.array_equal(edited, before)
    for number in (2, 1, 3):
        device.editor.revert(number)
    assert device.store.applied(device.identity).changes == {}
    np.testing.assert_array_equal(device.logits(), before)


def test_standing_edits_leave_ordinary_text_almost_as_likely(fresh: Device, device: Device) -> None:
    tokens = device.workspace.tokenizer.encode(held_out())
    apply_standing(fresh.workspace, fresh.store, fresh.engine)
    (before,) = fresh.workspace.surprise([tokens])
    apply_standing(device.workspace, device.store, device.engine)
    (after,) = device.workspace.surprise([tokens])
    assert (after - before) / len(tokens) < 0.03


@pytest.mark.parametrize("state", ["queued", "rejected", "reverted"])
def test_what_is_not_applied_cannot_be_undone_or_checked(device: Device, state: str) -> None:
    number = queued(device.store, device.engine, QUICK)
    if state == "rejected":
        device.store.begin(number)
        device.store.finish(number, "rejected", {}, None, {})
    if state == "reverted":
        number = device.editor.revert(2).id
    before = device.store.applied(device.identity).revision
    with pytest.raises(RequestError, match=state):
        device.editor.revert(number)
    with pytest.raises(RequestError, match=rf"is {state}; only an edit that is applied can be checked"):
        device.editor.evaluate(number)
    assert device.store.applied(device.identity).revision == before


def test_an_unknown_edit_is_said(device: Device) -> None:
    for attempt in (device.editor.run, device.editor.revert, device.editor.evaluate):
        with pytest.raises(AdapterNotFoundError, match="no adapter '99'"):
            attempt(99)


def test_checks_can_be_made_again(device: Device) -> None:
    again = {check.name: check for check in device.editor.evaluate(2)}
    assert (again["success"].before, again["success"].after) == (0, 1)
    assert again["paraphrases"].before == 0
    recorded = figures(device.store.get("2"))
    for name in ("paraphrases", "unrelated", "same subject"):
        assert again[name].after == pytest.approx(
            recorded[name], abs=0.25
        )  # another one stands beside it now


def test_what_was_made_elsewhere_stays_as_it_is(device: Device) -> None:
    """An imported adapter is no edit that could be solved again or checked."""
    changes = device.store.changes(2)
    device.editor.revert(2)
    imported = device.store.import_adapter("mine", "demo", device.identity, changes, {})
    with pytest.raises(RequestError, match="only an edit"):
        device.editor.evaluate(imported.id)
    device.editor.revert(1)
    np.testing.assert_array_equal(device.store.changes(imported.id)[0].a, changes[0].a)
    assert device.answers(OTHER, JOB) == ["Halcyon", "barber"]


# --- rejected ---------------------------------------------------------------------------------


def test_a_rejected_edit_is_not_applied_unless_it_is_forced(fresh: Device) -> None:
    before = fresh.logits()
    rejected = fresh.made(LONG, steps=2)
    assert rejected.state == "rejected"
    assert rejected.report["steps"] == 2
    assert rejected.report["reasons"][0] == "success: 0% of 1, 100% are needed"
    assert fresh.store.applied(fresh.identity).changes == {}
    np.testing.assert_array_equal(fresh.logits(), before)
    forced = fresh.made(LONG, steps=2, force=True)
    assert (forced.state, forced.report["reasons"]) == ("applied", rejected.report["reasons"])
    assert not np.array_equal(fresh.logits(), before)


def test_a_rejected_edit_leaves_standing_ones_alone(device: Device) -> None:
    before = device.store.applied(device.identity)
    assert device.made(LONG, steps=1).state == "rejected"
    after = device.store.applied(device.identity)
    assert after.revision == before.revision
    for name, changes in before.changes.items():
        np.testing.assert_array_equal(after.changes[name][0].a, changes[0].a)


@pytest.mark.parametrize("state", ["applied", "reverted"])
def test_an_edit_that_has_ended_is_not_made_again(device: Device, state: str) -> None:
    if state == "reverted":
        device.editor.revert(1)
    told: list[Progress] = []
    with pytest.raises(RequestError, match=state):
        device.editor.run(1, told.append)
    assert told == []  # before anything is computed
