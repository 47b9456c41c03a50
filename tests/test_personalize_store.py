"""The store of adapters and edits on real files: their states, and several processes at once."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_store_parts import MODEL, OTHER_MODEL, applied, change, running, same, solution
from program import REPOSITORY

from edge_runtime.errors import AdapterNotFoundError, RequestError
from edge_runtime.personalize.store import AdapterStore, State


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "home" / "adapters.db")


# --- records ----------------------------------------------------------------------------------


def test_reading_makes_no_database(store: AdapterStore) -> None:
    assert store.records() == []
    assert store.revision() == 0
    assert store.applied(MODEL).records == ()
    store.check()
    with pytest.raises(
        AdapterNotFoundError, match="no adapter 'oslo', nor any other; `edgert edit` makes one"
    ):
        store.get("oslo")
    with pytest.raises(AdapterNotFoundError, match="no adapter '1'"):
        store.changes(1)
    assert not store.path.parent.exists()


def test_it_is_private(store: AdapterStore) -> None:
    store.add("edit", "demo", MODEL, {})
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_a_new_edit_is_queued_with_its_request(store: AdapterStore) -> None:
    request = {"prompt": "Ann lives in", "target": "Oslo 🏔", "paraphrases": ["Ann's home is in"], "seed": 3}
    made = store.add("edit", "demo", MODEL, request)
    assert (made.name, made.model, made.identity, made.kind, made.state) == (
        "edit-1",
        "demo",
        MODEL,
        "edit",
        "queued",
    )
    assert (made.request, made.report, made.error) == (request, {}, "")
    assert made.created == made.changed > 1.7e9
    assert store.get("edit-1") == store.get("1") == made
    assert store.changes(made.id) == ()
    assert store.solution(made.id) is None
    assert store.revision() == 0


def test_records_come_oldest_first_and_by_model_and_state(store: AdapterStore) -> None:
    first = store.add("edit", "demo", MODEL, {}, name="oslo")
    second = store.add("forget", "demo", MODEL, {})
    third = store.add("edit", "other", OTHER_MODEL, {}, name="a")
    store.begin(second.id)
    assert [record.name for record in store.records()] == ["oslo", "forget-2", "a"]
    assert [record.id for record in store.records(MODEL)] == [first.id, second.id]
    assert [record.id for record in store.records(states=("queued",))] == [first.id, third.id]
    assert store.records(OTHER_MODEL, ("running",)) == []


def test_numbers_are_not_used_again_and_default_names_evade_chosen_ones(store: AdapterStore) -> None:
    store.add("edit", "demo", MODEL, {}, name="edit-3")
    gone = store.add("edit", "demo", MODEL, {})
    store.remove(gone.id)
    made = store.add("edit", "demo", MODEL, {})
    assert (made.id, made.name) == (3, "edit-3a")


@pytest.mark.parametrize(
    "name", ["", "7", "-a", "a b", "a/b", "..", ".a", "a\n", "ü", "a" * 65, "a\0", "a:b", "'; --"]
)
def test_names_are_checked(store: AdapterStore, name: str) -> None:
    with pytest.raises(RequestError, match="is no adapter name; use letters"):
        store.add("edit", "demo", MODEL, {}, name=name)
    with pytest.raises(RequestError, match="is no adapter name; use letters"):
        store.import_adapter(name, "demo", MODEL, [change()], {})
    assert store.records() == []


def test_a_name_is_used_once_whatever_its_capitals(store: AdapterStore) -> None:
    kept = store.add("edit", "demo", MODEL, {}, name="Oslo")
    for name in ("Oslo", "oslo"):
        with pytest.raises(RequestError, match=r"there is 'Oslo' already .*choose another name"):
            store.add("edit", "demo", OTHER_MODEL, {}, name=name)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'oslo'; there are Oslo"):
        store.get("oslo")
    assert store.records() == [kept]


@pytest.mark.parametrize("reference", ["", "0", "-1", "1.0", "99", "9" * 40, "²", "Edit-9", "x" * 500, "%"])
def test_an_unknown_one_is_said_with_those_there_are(store: AdapterStore, reference: str) -> None:
    for _ in range(22):
        store.add("edit", "demo", MODEL, {})
    with pytest.raises(
        AdapterNotFoundError, match=r"there are edit-22, edit-21, .*, edit-3, \.\.\."
    ) as caught:
        store.get(reference)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("model", "identity"),
    [("", MODEL), ("m" * 5000, MODEL), ("demo", ""), ("demo", "A" * 64), ("demo", "a" * 63)],
)
def test_the_model_is_checked(store: AdapterStore, model: str, identity: str) -> None:
    with pytest.raises(RequestError, match="model"):
        store.add("edit", model, identity, {})


@pytest.mark.parametrize(
    "request_", [{"a": float("nan")}, {"a": b""}, {"a": "\ud800"}, {"a": "x" * (1 << 23)}, {1j: 0}]
)
def test_a_request_that_json_cannot_hold_is_refused_unquoted(
    store: AdapterStore, request_: dict[str, object]
) -> None:
    with pytest.raises(RequestError, match="the request") as caught:
        store.add("edit", "demo", MODEL, request_)
    assert len(str(caught.value)) < 120
    assert store.records() == []


# --- states -----------------------------------------------------------------------------------


def test_an_edits_way_to_applied_and_back(store: AdapterStore) -> None:
    number = store.add("edit", "demo", MODEL, {"target": "Oslo"}).id
    store.begin(number)
    assert store.get("1").state == "running"
    store.keep_progress(number, 3, b"half way")
    store.keep_progress(number, 4, b"\0further")
    assert store.progress(number) == b"\0further"
    assert store.finish(number, "applied", {"success": 1.0}, solution(), {number: [change()]})
    record = store.get("1")
    assert (record.state, record.report, record.request) == ("applied", {"success": 1.0}, {"target": "Oslo"})
    assert record.changed > record.created
    assert store.progress(number) is None
    assert store.revision() == 1
    assert store.revert(number, {})
    assert store.get("1").state == "reverted"
    assert store.revision() == 2
    assert same(store.changes(number)[0], change())
    assert store.applied(MODEL).changes == {}


def test_a_rejected_one_is_kept_not_applied_and_can_be_forced(store: AdapterStore) -> None:
    number = running(store)
    assert store.finish(number, "rejected", {"reasons": ["locality"]}, solution(), {number: [change()]})
    assert store.get("1").report == {"reasons": ["locality"]}
    assert store.revision() == 0
    assert store.applied(MODEL).changes == {}
    found = store.changes(number)
    assert same(found[0], change())
    kept = store.solution(number)
    assert store.finish(number, "applied", {"forced": True}, kept, {number: found})
    assert list(store.applied(MODEL).changes) == ["edit-1"]


def test_a_failed_one_says_why(store: AdapterStore) -> None:
    number = running(store)
    store.keep_progress(number, 1, b"x")
    store.fail(number, "no memory " * 1000)
    record = store.get("1")
    assert record.state == "failed"
    assert record.error.startswith("no memory")
    assert len(record.error) == 4096
    assert store.progress(number) is None


def test_an_edit_that_lost_its_process_is_queued_again_with_its_progress(store: AdapterStore) -> None:
    number = running(store)
    store.keep_progress(number, 1, b"x")
    store.requeue(number)
    store.begin(number)
    assert store.progress(number) == b"x"


_INTO: dict[str, Callable[[AdapterStore, int], object]] = {
    "begin": lambda store, number: store.begin(number),
    "requeue": lambda store, number: store.requeue(number),
    "keep progress": lambda store, number: store.keep_progress(number, 1, b""),
    "apply": lambda store, number: store.finish(number, "applied", {}, None, {number: [change()]}),
    "reject": lambda store, number: store.finish(number, "rejected", {}, None, {}),
    "revert": lambda store, number: store.revert(number, {}),
    "fail": lambda store, number: store.fail(number, "x"),
    "remove": lambda store, number: store.remove(number),
}
_POSSIBLE: dict[State, set[str]] = {
    "queued": {"begin", "fail", "remove"},
    "running": {"requeue", "keep progress", "apply", "reject", "fail"},
    "applied": {"revert"},
    "rejected": {"apply", "remove"},
    "reverted": {"apply", "remove"},
    "failed": {"remove"},
}


@pytest.mark.parametrize("state", _POSSIBLE)
def test_what_is_not_possible_in_a_state_is_refused_and_changes_nothing(
    store: AdapterStore, state: State
) -> None:
    for action, do in _INTO.items():
        number = store.add("edit", "demo", MODEL, {}).id
        way = {
            "queued": [],
            "running": ["begin"],
            "applied": ["begin", "apply"],
            "rejected": ["begin", "reject"],
            "reverted": ["begin", "apply", "revert"],
            "failed": ["begin", "fail"],
        }
        for step in way[state]:
            _INTO[step](store, number)
        before, revision = store.get(str(number)), store.revision()
        assert before.state == state
        if action in _POSSIBLE[state]:
            do(store, number)
            continue
        with pytest.raises(RequestError, match=f"edit-{number} is {state}"):
            do(store, number)
        assert store.get(str(number)) == before
        assert store.revision() == revision


def test_a_refusal_says_what_is_possible(store: AdapterStore) -> None:
    number = applied(store)
    with pytest.raises(RequestError, match=r"is applied and cannot become running; it can become reverted$"):
        store.begin(number)
    with pytest.raises(RequestError, match="is applied and cannot be removed; revert it first"):
        store.remove(number)
    store.revert(number, {})
    with pytest.raises(RequestError, match="is reverted and cannot become running; it can become app"):
        store.begin(number)
    failed = store.add("edit", "demo", MODEL, {}).id
    store.fail(failed, "x")
    with pytest.raises(RequestError, match=r"is failed and cannot become applied; it can be removed$"):
        store.finish(failed, "applied", {}, None, {failed: [change()]})


@pytest.mark.parametrize("action", _INTO)
def test_what_is_done_to_no_record_is_said(store: AdapterStore, action: str) -> None:
    store.add("edit", "demo", MODEL, {})
    with pytest.raises(AdapterNotFoundError, match="no adapter '5'; there are edit-1"):
        _INTO[action](store, 5)


def test_removing_leaves_nothing_of_it_on_the_disk(store: AdapterStore) -> None:
    store.add("edit", "demo", MODEL, {}, name="kept")
    secret = "Ann moved to Oslo"
    number = store.add("edit", "demo", MODEL, {"prompt": secret}).id
    store.begin(number)
    store.finish(number, "rejected", {"said": secret * 1000}, solution(), {number: [change()]})
    content = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert secret.encode() in content
    store.remove(number)
    content = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert secret.encode() not in content
    assert b"kept" in content
    with closing(sqlite3.connect(store.path)) as database:
        for table in ("changes", "solutions", "progress"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# --- standing together ------------------------------------------------------------------------


def test_edits_that_are_solved_together_change_together(store: AdapterStore) -> None:
    first = applied(store, 1.0)
    second = running(store)
    store.finish(second, "applied", {}, solution(), {second: [change(2.0)], first: [change(3.0)]})
    found = store.applied(MODEL)
    assert [record.id for record in found.records] == [first, second]
    assert list(found.changes) == ["edit-1", "edit-2"]
    assert same(found.changes["edit-1"][0], change(3.0))
    assert same(found.changes["edit-2"][0], change(2.0))
    store.revert(second, {first: [change(4.0)]})
    found = store.applied(MODEL)
    assert list(found.changes) == ["edit-1"]
    assert same(found.changes["edit-1"][0], change(4.0))


def test_a_solution_of_what_is_no_longer_applied_is_not_kept(store: AdapterStore) -> None:
    first = applied(store)
    second = running(store)
    before = store.applied(MODEL).revision
    store.revert(first, {})
    assert not store.finish(second, "applied", {}, None, {second: [change()]}, revision=before)
    assert store.get(str(second)).state == "running"
    now = store.applied(MODEL).revision
    assert store.finish(second, "applied", {}, None, {second: [change()]}, revision=now)
    assert not store.revert(second, {}, revision=now)
    assert store.revert(second, {}, revision=now + 1)


def test_only_what_stands_is_solved_anew(store: AdapterStore) -> None:
    foreign = applied(store, model=OTHER_MODEL)
    reverted = applied(store)
    store.revert(reverted, {})
    number = running(store)
    before, revision = store.records(), store.revision()
    for other in (foreign, reverted):
        with pytest.raises(RequestError, match=rf"edit-{other} .* does not stand beside edit-{number}"):
            store.finish(number, "applied", {}, None, {number: [change()], other: [change()]})
    with pytest.raises(RequestError, match="cannot be applied without changes of its own"):
        store.finish(number, "applied", {}, None, {})
    with pytest.raises(RequestError, match="is rejected and must not change other records"):
        store.finish(number, "rejected", {}, None, {number: [change()], foreign: [change()]})
    with pytest.raises(RequestError, match="ends as applied or rejected, not as 'failed'"):
        store.finish(number, "failed", {}, None, {})
    with pytest.raises(AdapterNotFoundError):
        store.finish(number, "applied", {}, None, {number: [change()], 99: [change()]})
    with pytest.raises(RequestError, match="does not stand beside"):
        store.revert(foreign, {foreign: [change()]})
    assert store.records() == before
    assert store.revision() == revision


def test_what_fails_in_the_middle_leaves_everything_as_it_was(store: AdapterStore) -> None:
    first = applied(store, 1.0)
    number = running(store)
    store.keep_progress(number, 1, b"x")
    broken = replace(change(), a=np.full((1, 6), np.nan, np.float32))
    with pytest.raises(RequestError, match="not finite"):
        store.finish(number, "applied", {"x": 1}, solution(), {first: [change(2.0)], number: [broken]})
    assert same(store.changes(first)[0], change(1.0))
    assert (store.get(str(number)).state, store.get(str(number)).report) == ("running", {})
    assert store.progress(number) == b"x"
    assert store.solution(number) is None
    assert store.revision() == 1


# --- several at once, and their ends ----------------------------------------------------------


def run(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, REPOSITORY / "tests" / "adapter_store_writer.py", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> str:
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    return out.decode()


def test_two_processes_work_through_one_queue(store: AdapterStore) -> None:
    """Each edit is begun by one of them, and what both applied is solved together in the end."""
    for _ in range(40):
        store.add("edit", "demo", MODEL, {})
    both = [run("work", store.path, worker) for worker in range(2)]
    counts = [int(ended(process)) for process in both]
    assert sum(counts) == 40
    assert min(counts) > 0
    found = store.applied(MODEL)
    assert found.revision == len(found.records) == 40
    # Each change says with how many others it was solved last.
    assert {change.scale for changes in found.changes.values() for change in changes} == {40.0}


def test_a_reader_sees_one_moment_while_others_write(store: AdapterStore) -> None:
    standing: list[int] = []
    for _ in range(50):  # so that reading them takes a while
        number = running(store)
        store.finish(number, "applied", {}, None, {number: [change(0.0)]})
        standing.append(number)
    stop = threading.Event()

    def write() -> None:
        value = 0.0
        while not stop.is_set():
            value += 1
            number = running(store)
            solved = {each: [change(value)] for each in [*standing, number]}
            store.finish(number, "applied", {}, None, solved)
            store.revert(number, {each: [change(-value)] for each in standing})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = set()
        while len(seen) < 30:
            values = {changes[0].scale for changes in store.applied(MODEL).changes.values()}
            assert len(values) == 1, values
            seen |= values
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")
def test_kills_leave_every_edit_whole_or_absent(store: AdapterStore) -> None:
    """Three hundred writers are killed at random moments; after each, everything is checked.

    `adapter_store_writer.py` says what; a writer writes each result that it was promised to a pipe first.
    """
    report = ended(run("kill", store.path, 300, 1))
    kills, promises, in_the_middle = map(int, report.split())
    assert kills == 300
    assert promises > 300
    assert in_the_middle > 30  # kills between two promises of one edit, not before the first write
    store.check()
