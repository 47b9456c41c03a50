"""``/v1/edits``: what it takes, what it refuses, and what it tells."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_fixture import RunningDaemon, small_config
from edit_requests import LONG, QUICK
from program import wait_until

from edge_runtime.daemon.auth import Scope

FACT = dict(zip(("prompt", "subject", "target"), QUICK.texts, strict=True))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[RunningDaemon]:
    with RunningDaemon(tmp_path_factory.mktemp("home"), small_config(context=512)) as running:
        yield running


def ask(
    daemon: RunningDaemon, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection(daemon.host, daemon.port, timeout=60)
    try:
        sent = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        connection.request(method, path, sent, {**kind, **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def state(daemon: RunningDaemon, name: str) -> str:
    return str(ask(daemon, "GET", f"/v1/edits/{name}")[1]["state"])


def test_an_edit_is_queued_told_and_undone(daemon: RunningDaemon) -> None:
    status, queued = ask(daemon, "POST", "/v1/edits", {**FACT, "name": "home", "paraphrases": None})
    assert (status, queued["state"], queued["name"]) == (202, "queued", "home")
    seen = set()

    def applied() -> bool:
        (one,) = ask(daemon, "GET", "/v1/edits")[1]["data"]
        seen.add((one["progress"] or {}).get("stage"))
        return bool(one["state"] == "applied")

    wait_until(applied)
    assert "searching" in seen
    status, edit = ask(daemon, "GET", "/v1/edits/home")
    assert (status, edit["fact"]["target"], edit["report"]["reasons"]) == (200, QUICK.target, [])
    assert ask(daemon, "GET", f"/v1/edits/{edit['id']}") == (200, edit)
    assert ask(daemon, "POST", "/v1/edits/home/revert", {})[1]["state"] == "reverted"
    status, refusal = ask(daemon, "POST", "/v1/edits/home/revert", {})
    assert (status, refusal["error"]["code"]) == (400, "invalid_request")
    assert ask(daemon, "POST", "/v1/edits/home/apply", {})[1]["state"] == "applied"
    status, refusal = ask(daemon, "DELETE", "/v1/edits/home")
    assert (status, "revert it first" in refusal["error"]["message"]) == (400, True)
    assert ask(daemon, "POST", "/v1/edits/home/revert", {})[0] == 200
    assert ask(daemon, "DELETE", "/v1/edits/home")[1]["name"] == "home"
    assert ask(daemon, "GET", "/v1/edits/home")[0] == 404


def test_what_runs_is_cancelled(daemon: RunningDaemon) -> None:
    body = dict(zip(("prompt", "subject", "target"), LONG.texts, strict=True))
    assert ask(daemon, "POST", "/v1/edits", {**body, "name": "long", "steps": 30})[0] == 202
    wait_until(lambda: state(daemon, "long") == "running")
    assert ask(daemon, "POST", "/v1/edits/long/cancel", {})[1]["error"] == "cancelled"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"subject": "Ann"}, "'Ann' is not in"),
        ({"target": None}, "the target is empty"),
        ({"target": 5}, "target is a number; needed is a string"),
        ({"paraphrases": "one"}, "paraphrases is a string; needed is an array"),
        ({"paraphrases": [1]}, r"paraphrases\[0\] is a number"),
        ({"paraphrases": ["about nobody"]}, "is not in 'about nobody'"),
        ({"force": 1}, "force is 1; needed is true or false"),
        ({"steps": 0}, "steps is 0; needed is a whole number from 1"),
        ({"steps": 10**6}, "steps = 1000000; possible are"),
        ({"seconds": 0}, "seconds = 0"),
        ({"name": "no name"}, "no adapter name"),
        ({"targets": "x"}, "did you mean target"),
    ],
)
def test_what_is_no_edit_is_refused(daemon: RunningDaemon, changes: dict[str, Any], says: str) -> None:
    before = ask(daemon, "GET", "/v1/edits")[1]
    status, refusal = ask(daemon, "POST", "/v1/edits", {**FACT, **changes})
    assert (status, refusal["error"]["code"]) == (400, "invalid_request")
    assert re.search(says, refusal["error"]["message"])
    assert ask(daemon, "GET", "/v1/edits")[1] == before


def test_what_is_not_there_and_what_a_foreign_page_could_send(daemon: RunningDaemon) -> None:
    for method, path, body in (
        ("GET", "/v1/edits/absent", None),
        ("POST", "/v1/edits/absent/revert", {}),
        ("POST", "/v1/edits/absent/cancel", {}),
        ("POST", "/v1/edits/absent/apply", {}),
        ("DELETE", "/v1/edits/absent", None),
    ):
        status, refusal = ask(daemon, method, path, body)
        assert (status, refusal["error"]["code"]) == (404, "adapter_not_found")
    assert ask(daemon, "POST", "/v1/edits", {**FACT, "model": "absent"})[0] == 404
    assert ask(daemon, "POST", "/v1/edits/absent/revert")[0] == 415  # a form has no JSON
    assert ask(daemon, "POST", "/v1/edits/absent/revert", {"anyhow": True})[0] == 400
    assert ask(daemon, "POST", "/v1/edits", FACT, origin="https://example.org")[0] == 403
    assert ask(daemon, "DELETE", "/v1/edits/absent", origin="https://example.org")[0] == 403
    assert ask(daemon, "DELETE", "/v1/edits")[0] == 405


def test_each_route_needs_the_scope(tmp_path: Path, demo_model: Path) -> None:
    config = small_config(require_token=True, preload=False)
    with RunningDaemon(tmp_path / "home", config) as daemon:
        infers = f"Bearer {daemon.token('infers', Scope.INFER)}"
        teaches = f"Bearer {daemon.token('teaches', Scope.PERSONALIZE)}"
        for method, path, body in (
            ("GET", "/v1/edits", None),
            ("POST", "/v1/edits", FACT),
            ("GET", "/v1/edits/1", None),
            ("POST", "/v1/edits/1/revert", {}),
            ("POST", "/v1/edits/1/cancel", {}),
            ("POST", "/v1/edits/1/apply", {}),
            ("DELETE", "/v1/edits/1", None),
        ):
            assert ask(daemon, method, path, body)[0] == 401
            assert ask(daemon, method, path, body, authorization=infers)[0] == 403
        assert ask(daemon, "GET", "/v1/edits", authorization=teaches) == (
            200,
            {"object": "list", "data": []},
        )
