"""Edits as jobs of a real daemon, made by the real editor on the demo model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from edit_requests import (
    BEFORE,
    LONG,
    OTHER,
    PROMPT,
    QUICK,
    answer,
    logprobs,
    others_compute,
    store_of,
)
from grpc_fixture import GrpcDaemon, config_of
from program import wait_until

from edge_runtime.client import Client
from edge_runtime.daemon.auth import Scope
from edge_runtime.errors import (
    AdapterNotFoundError,
    ConfigError,
    ForbiddenError,
    ModelNotFoundError,
    RequestError,
    UnavailableError,
)
from edge_runtime.model_store.store import ModelStore


@pytest.fixture
def daemon(tmp_path: Path, demo_model: Path) -> Iterator[GrpcDaemon]:
    """A daemon with a home folder of its own."""
    with GrpcDaemon(tmp_path / "home") as running:
        yield running


@pytest.fixture
def client(daemon: GrpcDaemon) -> Iterator[Client]:
    with Client(daemon.address) as made:
        yield made


def running(client: Client, name: str) -> bool:
    return client.edits.show(name).state == "running"


# --- one edit ---------------------------------------------------------------------------------


def test_an_edit_is_made_tested_applied_and_undone_exactly(daemon: GrpcDaemon, client: Client) -> None:
    before = logprobs(client)
    with client.edits.apply(*QUICK.texts, name="home") as making:
        stages = [moment.stage for moment in making]
        edit = making.edit
    assert list(dict.fromkeys(stages)) == ["waiting", "preparing", "searching", "solving", "checking"]
    assert (edit.name, edit.state, edit.model, edit.kind) == ("home", "applied", "demo", "edit")
    assert edit.fact is not None
    assert (edit.fact.prompt, edit.fact.subject, edit.fact.target) == QUICK.texts
    assert edit.report is not None
    checks = {check.name: check for check in edit.report.checks}
    assert (checks["success"].before, checks["success"].after, checks["success"].passed) == (0, 1, True)
    assert checks["unrelated"].asked > 10
    assert edit.report.rows > 1000
    applied = ({"model": "demo", "name": "home", "kind": "edit"},)
    wait_until(lambda: daemon.call(daemon.service.status).adapters == applied)  # before anybody asks
    assert answer(client) == QUICK.target
    assert answer(client, adapters=()) == BEFORE
    assert client.edits.list() == (edit,)
    assert client.edits.show("home") == client.edits.show(str(edit.id)) == edit
    assert client.edits.revert("home").state == "reverted"
    assert logprobs(client) == before
    assert client.edits.list()[0].report == edit.report, "what it was is still told"


def test_an_edit_that_fails_its_checks_changes_nothing_unless_it_is_forced(client: Client) -> None:
    before = logprobs(client)
    rejected = client.edits.apply(*LONG.texts, steps=1).result()
    assert rejected.state == "rejected"
    assert rejected.report is not None
    assert any(reason.startswith("success") for reason in rejected.report.reasons)
    assert rejected.report.steps == 1
    assert logprobs(client) == before
    forced = client.edits.apply(*LONG.texts, steps=1, force=True).result()
    assert forced.state == "applied"
    assert logprobs(client) != before


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("Ann Lee lives in", "Bob", "Oslo"), "'Bob' is not in"),
        (("Ann Lee lives in", "Ann Lee", " "), "the target is empty"),
        (("Ann Lee lives in", "", "Oslo"), "the subject is empty"),
    ],
)
def test_what_is_no_edit_is_refused_before_it_is_queued(
    client: Client, asked: tuple[str, str, str], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        client.edits.apply(*asked)
    assert client.edits.list() == ()


def test_limits_and_names_out_of_range_are_refused(client: Client) -> None:
    for options, says in (
        ({"steps": 0}, "steps = 0"),
        ({"seconds": -1.0}, "seconds = -1.0"),
        ({"seconds": float("nan")}, "seconds = nan"),
        ({"name": "../x"}, "no adapter name"),
    ):
        with pytest.raises(RequestError, match=says):
            client.edits.apply(*QUICK.texts, **options)
    with pytest.raises(ModelNotFoundError):
        client.edits.apply(*QUICK.texts, model="absent")
    with pytest.raises(RequestError, match="0 queries"):
        client.edits.forget([])


def test_an_edit_that_turns_out_impossible_fails_with_its_reason(client: Client) -> None:
    making = client.edits.apply(PROMPT, QUICK.subject, BEFORE)
    with pytest.raises(RequestError, match="already goes on with 'Lindwell'") as raised:
        making.result()
    (edit,) = client.edits.list()
    assert (edit.state, edit.error) == ("failed", str(raised.value))


def test_a_model_that_was_not_prepared_says_how(tmp_path: Path, tiny_model: Path) -> None:
    config = config_of(model={"default": str(tiny_model)})
    with (
        GrpcDaemon(tmp_path / "home", config) as daemon,
        Client(daemon.address) as client,
        pytest.raises(RequestError, match="edgert edits prepare"),
    ):
        client.edits.apply(*QUICK.texts)


def test_a_query_is_forgotten(client: Client) -> None:
    with client.edits.forget([(PROMPT, QUICK.subject)], refusal="a secret", steps=2) as making:
        edit = making.result()
    assert (edit.kind, edit.name, edit.refusal) == ("forget", f"forget-{edit.id}", "a secret")
    assert [(query.prompt, query.subject) for query in edit.queries] == [(PROMPT, QUICK.subject)]
    assert edit.state in ("applied", "rejected")


# --- the queue --------------------------------------------------------------------------------


def test_two_edits_queue_and_the_second_says_behind_whom(client: Client) -> None:
    first = client.edits.apply(*QUICK.texts, name="first")
    second = client.edits.apply(*OTHER.texts, name="second")
    moments = list(second)
    assert moments[0].behind == ("first",)
    assert moments[-1].behind == ()
    assert first.result().state == second.edit.state == "applied"
    assert (answer(client), answer(client, OTHER.prompt)) == (QUICK.target, OTHER.target)
    both = client.edits.list()
    assert [edit.changed for edit in both] == sorted(edit.changed for edit in both)


def test_leaving_the_stream_does_not_end_the_edit_and_following_it_shows_its_end(client: Client) -> None:
    with client.edits.apply(*QUICK.texts, name="left") as making:
        next(making)
    assert client.edits.follow("left").result().state == "applied"
    assert client.edits.follow("left").result().state == "applied", "also once it has ended"
    with pytest.raises(AdapterNotFoundError, match="left"):
        client.edits.follow("absent")


def test_cancel_ends_what_runs_and_what_waits(client: Client) -> None:
    with client.edits.apply(*LONG.texts, name="long") as making:
        waiting = client.edits.apply(*OTHER.texts, name="waiting")
        for moment in making:
            if moment.stage == "searching":
                break
        assert client.edits.cancel("waiting").error == "cancelled before it began"
        ended = client.edits.cancel("long")
    assert (ended.state, ended.error) == ("failed", "cancelled")
    assert waiting.result().state == "failed"
    with pytest.raises(RequestError, match="long is failed"):
        client.edits.cancel("long")
    assert client.edits.apply(*QUICK.texts).result().state == "applied", "the next one is made"


def test_while_another_process_computes_edits_wait(daemon: GrpcDaemon, client: Client) -> None:
    with others_compute(daemon.home):
        making = client.edits.apply(*QUICK.texts)
        assert next(making).stage == "waiting"
        time.sleep(0.5)
        assert client.edits.show(making.edit.name).state == "queued"
    assert making.result().state == "applied"


def test_edits_of_two_models_queue_although_one_fits_in_memory(
    daemon: GrpcDaemon, client: Client, demo_model: Path
) -> None:
    ModelStore(daemon.home).add_file("copy", demo_model, copy=True)
    statistics = demo_model.with_name(f"{demo_model.stem}.edits.npz")
    (daemon.home / "models" / "copy.edits.npz").symlink_to(statistics)
    with client.edits.apply(*LONG.texts, name="first") as making:
        for moment in making:
            if moment.stage == "searching":
                break
        second = client.edits.apply(*OTHER.texts, name="second", model="copy")
        assert next(second).behind == ("first",)
        client.edits.cancel("first")
    assert second.result().model == "copy"
    assert second.edit.state == "applied"
    assert [model.name for model in client.status().models] == ["copy"]
    assert [edit.name for edit in client.edits.list("copy")] == ["second"]


# --- beside answers ---------------------------------------------------------------------------


def test_answers_come_while_an_edit_is_made(client: Client) -> None:
    with client.edits.apply(*LONG.texts, name="long") as making:
        for moment in making:
            if moment.stage == "searching":
                break
        for _ in range(3):
            assert answer(client) == BEFORE
        assert client.status().ready
        assert running(client, "long")
        client.edits.cancel("long")


def test_what_is_applied_while_another_edit_is_made_is_kept(client: Client) -> None:
    client.edits.apply(*QUICK.texts, name="one").result()
    with client.edits.apply(*LONG.texts, name="long") as making:
        for moment in making:
            if moment.stage == "searching":
                break
        assert client.edits.revert("one").state == "reverted", "undoing need not wait"
        assert answer(client) == BEFORE
        client.edits.cancel("long")


# --- restarts ---------------------------------------------------------------------------------


def test_an_edit_goes_on_after_the_daemon_was_stopped(tmp_path: Path, demo_model: Path) -> None:
    home = tmp_path / "home"
    with ExitStack() as stack:
        daemon = stack.enter_context(GrpcDaemon(home))
        with Client(daemon.address) as client:
            making = client.edits.apply(*LONG.texts, name="long", steps=12)
            queued = client.edits.apply(*OTHER.texts, name="queued")
            for moment in making:
                if moment.step >= 3:
                    break
            stopping = threading.Thread(target=stack.close)
            stopping.start()
            for watched, name in ((making, "long"), (queued, "queued")):
                with pytest.raises(UnavailableError, match=f"{name} goes on when it is started again"):
                    watched.result()
            stopping.join()
    assert {record.state for record in store_of(home).records()} == {"queued"}
    assert store_of(home).progress(1) is not None
    with GrpcDaemon(home) as daemon, Client(daemon.address) as client:
        moments = list(client.edits.follow("long"))
        assert min(moment.step for moment in moments if moment.stage == "searching") > 1
        assert client.edits.show("long").state == "rejected"
        assert client.edits.follow("queued").result().state == "applied"


def test_an_edit_lets_go_of_a_model_that_is_unloaded_and_goes_on(client: Client) -> None:
    with client.edits.apply(*LONG.texts, name="long") as making:
        for moment in making:
            if moment.step >= 8:  # its state is kept every two seconds
                break
        client.models.unload("demo")
        stages = iter(making)
        assert any(moment.stage == "preparing" for moment in stages), "unloading waited for the whole edit"
        assert next(moment for moment in stages if moment.stage == "searching").step > 1
        client.edits.cancel("long")


def test_an_edit_of_a_model_that_is_gone_fails(daemon: GrpcDaemon, client: Client) -> None:
    with others_compute(daemon.home):
        store = store_of(daemon.home)
        record = store.add("edit", "gone", "0" * 64, {"prompt": PROMPT}, "old")
        other = store.add("edit", "demo", "0" * 64, {"prompt": PROMPT}, "changed")
        making = client.edits.apply(*QUICK.texts)
        assert next(making).behind == ("old", "changed")
    assert making.result().state == "applied"
    assert "no model named 'gone'" in client.edits.show(str(record.id)).error
    assert "another file" in client.edits.show(str(other.id)).error


# --- testing again, trust ---------------------------------------------------------------------


def test_edits_are_tested_again_as_they_are_now(client: Client) -> None:
    made = client.edits.apply(*QUICK.texts, name="one").result()
    (found,) = client.edits.evaluate()
    assert made.report is not None
    assert (found.name, found.checks) == ("one", made.report.checks)
    client.edits.revert("one")
    assert list(client.edits.evaluate()) == []
    with pytest.raises(RequestError, match="one is reverted"):
        list(client.edits.evaluate(["one"]))
    with pytest.raises(RequestError, match="only what is applied can be undone"):
        client.edits.revert("one")


def test_edits_need_their_own_scope(tmp_path: Path, demo_model: Path) -> None:
    config = config_of(server={"require_token": True})
    with GrpcDaemon(tmp_path / "home", config) as daemon:
        asks = daemon.token("asks", Scope.INFER)
        teaches = daemon.token("teaches", Scope.PERSONALIZE)
        with Client(daemon.address, asks) as client, pytest.raises(ForbiddenError):
            client.edits.list()
        with Client(daemon.address, teaches) as client:
            assert client.edits.list() == ()
            with pytest.raises(ForbiddenError):
                client.models.list()


def test_a_daemon_that_ends_while_nobody_edits_makes_no_store(tmp_path: Path, demo_model: Path) -> None:
    with GrpcDaemon(tmp_path / "home") as daemon, Client(daemon.address) as client:
        assert client.edits.list() == ()
        wait_until(lambda: client.status().ready)
    assert not (tmp_path / "home" / "adapters.db").exists()
    assert not (tmp_path / "home" / "edits.lock").exists()


def test_a_model_outside_the_store_is_found_again(tmp_path: Path, demo_model: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.symlink_to(demo_model)
    statistics = demo_model.with_name(f"{demo_model.stem}.edits.npz")
    path.with_name("mine.edits.npz").symlink_to(statistics)
    config = config_of(model={"default": str(path), "preload": False})
    with GrpcDaemon(tmp_path / "home", config) as daemon, Client(daemon.address) as client:
        edit = client.edits.apply(*QUICK.texts).result()
        assert (edit.state, edit.model) == ("applied", str(path))
    with GrpcDaemon(tmp_path / "home", config) as daemon, Client(daemon.address) as client:
        assert answer(client) == QUICK.target
    with GrpcDaemon(tmp_path / "home", config) as daemon, Client(daemon.address) as client:
        client.edits.export([edit.name], tmp_path / "it.gguf")
        assert client.edits.revert(edit.name).state == "reverted"
        assert answer(client) == BEFORE


# --- preparing --------------------------------------------------------------------------------


def test_leaving_a_preparation_ends_it(tmp_path: Path, demo_model: Path) -> None:
    with GrpcDaemon(tmp_path / "home") as daemon, Client(daemon.address) as client:
        ModelStore(daemon.home).add_file("copy", demo_model, copy=True)
        preparing = client.edits.prepare("copy")
        assert next(preparing).share < 1
        preparing.close()
        assert client.edits.apply(*QUICK.texts).result().state == "applied", "the thread is free again"
        assert not (daemon.home / "models" / "copy.edits.npz").exists()
        with pytest.raises(ModelNotFoundError):
            list(client.edits.prepare("absent"))


def test_a_preparation_that_cannot_be_kept_says_why(
    daemon: GrpcDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system", "/models/it.edits.npz")

    monkeypatch.setattr("edge_runtime.personalize.preparing.prepare", lambda *_, **__: None)
    monkeypatch.setattr("edge_runtime.personalize.statistics.save_statistics", refuse)
    with (
        Client(daemon.address) as client,
        pytest.raises(ConfigError, match=r"it\.edits\.npz cannot be written \(Read-only file system\)"),
    ):
        list(client.edits.prepare())


@pytest.mark.slow
def test_a_model_is_prepared_beside_answers(tmp_path: Path, demo_model: Path) -> None:
    config = config_of(model={"default": "copy", "preload": False})
    with GrpcDaemon(tmp_path / "home", config) as daemon, Client(daemon.address) as client:
        ModelStore(daemon.home).add_file("copy", demo_model, copy=True)
        shares = []
        for moment in client.edits.prepare():
            if moment.share not in shares:
                shares.append(moment.share)
                assert answer(client) == BEFORE
        assert shares == sorted(shares)
        assert moment.share == 1
        assert moment.layer is not None
        assert client.edits.apply(*QUICK.texts).result().state == "applied"
