"""Edits that cannot be, and what an edit tells while it is made; with the real model and a real store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edit_requests import BEFORE, LONG, OTHER, QUICK, Asked
from editing_parts import Device, device_with, opened, queued

from edge_runtime.engine.engine import Engine
from edge_runtime.errors import ContextOverflowError, ModelFileError, RequestError
from edge_runtime.personalize.editor import Editor, Method
from edge_runtime.personalize.progress import Cancelled, Progress
from edge_runtime.personalize.records import Record
from edge_runtime.personalize.resume import Kept, Spent, to_bytes
from edge_runtime.personalize.search import Budget
from edge_runtime.personalize.statistics import load_statistics, statistics_path
from edge_runtime.personalize.workspace import Workspace


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Engine]:
    with opened(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def workspace(engine: Engine) -> Iterator[Workspace]:
    with Workspace(engine) as workspace:
        yield workspace


@pytest.fixture
def fresh(engine: Engine, workspace: Workspace, tmp_path: Path) -> Device:
    return device_with(engine, workspace, tmp_path / "fresh.db")


# --- requests that cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (Asked(QUICK.prompt, "Ann Lee", "Oslo"), RequestError, "subject 'Ann Lee' is not in 'The home of"),
        (Asked(QUICK.prompt, "Colt", "Oslo"), RequestError, "is not in"),
        (Asked(QUICK.prompt, QUICK.subject, "  "), RequestError, "the target is empty; an edit needs"),
        (Asked("", QUICK.subject, "Oslo"), RequestError, "the prompt is empty"),
        (Asked(QUICK.prompt, "", "Oslo"), RequestError, "the subject is empty"),
        (Asked(QUICK.prompt, QUICK.subject, BEFORE), RequestError, "already goes on with 'Lindwell'"),
        (Asked(QUICK.prompt, QUICK.subject, f"{BEFORE}."), RequestError, "already goes on with 'Lindwell'"),
        (Asked(QUICK.prompt, QUICK.subject, "x" * 201), RequestError, "target has 201 characters; possible"),
        (Asked("x" * 2001, QUICK.subject, "Oslo"), RequestError, "prompt has 2001 characters"),
        (
            Asked("one of " * 260 + QUICK.prompt, QUICK.subject, "Oslo"),
            ContextOverflowError,
            "with an answer .* the model was trained for: give the sentence",
        ),
        (
            Asked("one of " * 200 + QUICK.prompt, QUICK.subject, "Oslo"),
            ContextOverflowError,
            r"texts that the change is searched with .* too many .* \(1024\); give the sentence",
        ),
    ],
)
def test_impossible_requests_say_what_to_do(
    fresh: Device, asked: Asked, error: type[Exception], message: str
) -> None:
    number = queued(fresh.store, fresh.engine, asked)
    with pytest.raises(error, match=message):
        fresh.editor.run(number)
    assert fresh.store.get(str(number)).state == "running"  # its caller says what becomes of it
    assert fresh.store.applied(fresh.identity).changes == {}


@contextmanager
def copied(engine: Engine, folder: Path) -> Iterator[Engine]:
    path = folder / "copy.gguf"
    path.symlink_to(engine.gguf.path)
    with opened(path) as other:
        yield other


def test_a_model_without_sound_statistics_is_not_edited(engine: Engine, tmp_path: Path) -> None:
    with copied(engine, tmp_path) as other:
        with pytest.raises(RequestError, match="run `edgert edits prepare`"):
            load_statistics(other.gguf)
        shutil.copy(statistics_path(engine.gguf.path), statistics_path(other.gguf.path))
        load_statistics(other.gguf)
        content = statistics_path(other.gguf.path).read_bytes()
        statistics_path(other.gguf.path).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelFileError, match="make them anew with `edgert edits prepare`"):
            load_statistics(other.gguf)


def test_an_edit_of_another_model_is_refused(fresh: Device) -> None:
    request = {"prompt": QUICK.prompt, "subject": QUICK.subject, "target": QUICK.target}
    other = fresh.store.add("edit", "other", "c" * 64, request)
    with pytest.raises(RequestError, match="edit-1 is of the model 'other'"):
        fresh.editor.run(other.id)
    assert fresh.store.get("1").state == "queued"


# --- progress ---------------------------------------------------------------------------------


def test_progress_tells_every_stage(fresh: Device) -> None:
    told: list[Progress] = []
    number = queued(fresh.store, fresh.engine, OTHER, steps=30)
    record = fresh.editor.run(number, told.append)
    stages = list(dict.fromkeys(moment.stage for moment in told))
    assert stages == ["preparing", "searching", "solving", "checking"]
    searching = [moment for moment in told if moment.stage == "searching"]
    assert [moment.step for moment in searching] == list(range(1, record.report["steps"] + 1))
    assert all(moment.steps == 30 for moment in searching)
    assert searching[-1].loss < searching[0].loss
    assert 0 < searching[0].probability < 0.5 < searching[-1].probability <= 1
    assert [moment.rows for moment in told] == sorted(moment.rows for moment in told)
    assert record.state == "applied"


def test_a_cancelled_edit_goes_on_later(fresh: Device) -> None:
    steps: list[int] = []

    def cancel(progress: Progress) -> None:
        if progress.stage == "searching":
            steps.append(progress.step)
            if progress.step == 3:
                raise Cancelled

    number = queued(fresh.store, fresh.engine, OTHER)
    with pytest.raises(Cancelled):
        fresh.editor.run(number, cancel)
    assert steps == [1, 2, 3]
    assert fresh.store.get(str(number)).state == "running"
    assert fresh.store.applied(fresh.identity).changes == {}
    rest: list[int] = []
    record = fresh.editor.run(number, lambda p: rest.append(p.step) if p.stage == "searching" else None)
    assert record.state == "applied"
    assert rest[0] == 4
    assert fresh.answers(OTHER) == [OTHER.target]
    # Asking and checking, twice, are rows that no search computed.
    whole = fresh.editor.run(queued(fresh.store, fresh.engine, QUICK, steps=1, force=True)).report
    asked = whole["rows"] - whole["search_rows"]
    assert record.report["rows"] - record.report["search_rows"] > 1.2 * asked


def test_the_time_for_searching_is_not_given_again(fresh: Device) -> None:
    number = queued(fresh.store, fresh.engine, QUICK, seconds=60)
    fresh.store.begin(number)
    fresh.store.keep_progress(number, 0, to_bytes(Kept(spent=Spent(70, 9000), searching=Spent(61, 8000))))
    record = fresh.editor.run(number)
    assert (record.state, record.report["steps"]) == ("rejected", 0)
    assert record.report["seconds"] > 70
    assert 8000 < record.report["search_rows"] < 9000 < record.report["rows"]


def test_each_pass_takes_its_turn(fresh: Device) -> None:
    turns: list[str] = []

    @contextmanager
    def turn() -> Iterator[None]:
        assert turns[-1:] != ["begun"]
        turns.append("begun")
        yield
        turns.append("ended")

    method = Method(budget=Budget(steps=1))
    editor = Editor(fresh.engine, fresh.store, load_statistics(fresh.engine.gguf), turn=turn, method=method)
    assert editor.run(queued(fresh.store, fresh.engine, LONG)).report["steps"] == 1
    assert turns.count("begun") == turns.count("ended") > 20


def test_what_is_applied_meanwhile_is_solved_again(fresh: Device) -> None:
    """The solution is kept only if what stands is still what it was computed with."""
    imported: list[Record] = []
    stages: list[str] = []

    def interfere(progress: Progress) -> None:
        stages.append(progress.stage)
        if progress.stage == "checking" and not imported:
            number = queued(fresh.store, fresh.engine, OTHER)
            imported.append(fresh.editor.run(number))

    record = fresh.editor.run(queued(fresh.store, fresh.engine, QUICK), interfere)
    assert [record.state, imported[0].state] == ["applied", "applied"]
    assert fresh.answers(QUICK, OTHER) == [QUICK.target, OTHER.target]
    assert stages.count("solving") == 2
