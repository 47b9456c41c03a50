"""The HTTP API's edge: who is let in, what is refused, and what errors look like."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_fixture import (
    COMPLETE,
    RunningDaemon,
    Served,
    connect,
    finished,
    request_bytes,
    small_config,
    until,
)
from starlette.requests import Request
from starlette.responses import Response

CHAT = "/v1/chat/completions"
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with RunningDaemon(tmp_path_factory.mktemp("http"), small_config(max_body_bytes=MAX_BODY)) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon that wants tokens."""
    with RunningDaemon(tmp_path_factory.mktemp("guarded"), small_config(require_token=True)) as running:
        yield running


# --- who is let in ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_what_holds_no_secrets_needs_no_token(guarded: RunningDaemon, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/api/status", "/v1/models", "/v1/models/demo"])
def test_what_tells_something_needs_a_token(guarded: RunningDaemon, path: str) -> None:
    refused = httpx.get(guarded.url + path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"
    token = guarded.token(path.replace("/", "x"))
    for kind in ("Bearer", "bearer"):
        answer = httpx.get(guarded.url + path, headers={"authorization": f"{kind} {token}"})
        assert answer.status_code == 200
    for wrong in (f"Basic {token}", token, f"Bearer {token}x"):
        assert httpx.get(guarded.url + path, headers={"authorization": wrong}).status_code in (401, 429)


@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/v1/embeddings"])
def test_a_token_is_checked_before_the_body_is_read(guarded: RunningDaemon, path: str) -> None:
    answer = httpx.post(guarded.url + path, content=b"{" * 100_000)
    assert answer.status_code == 401


def test_two_tokens_are_none(guarded: RunningDaemon) -> None:
    token = guarded.token("twice")
    headers = [("authorization", f"Bearer {token}")] * 2
    assert httpx.get(guarded.url + "/v1/models", headers=headers).status_code == 401


def test_guessing_tokens_is_slowed_down(tmp_path: Path) -> None:
    with RunningDaemon(tmp_path, small_config(require_token=True, preload=False)) as fresh:
        answers = [
            httpx.get(fresh.url + "/v1/models", headers={"authorization": f"Bearer guess{n}"})
            for n in range(12)
        ]
    assert answers[0].status_code == 401
    assert answers[-1].status_code == 429 and int(answers[-1].headers["retry-after"]) >= 1


# --- what a browser was tricked into ----------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8420", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.0.1", 403),
        ("[::2]", 403),
        ("[", 403),
        ("", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8420", 200),
        ("127.1.2.3", 200),
        ("[::1]:8420", 200),
    ],
)
def test_only_names_of_loopback_are_answered_there(daemon: RunningDaemon, host: str, status: int) -> None:
    for path in ("/", "/healthz", "/v1/models"):
        assert httpx.get(daemon.url + path, headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "https://{own}"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://{own}", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_origins_may_not_ask(
    daemon: RunningDaemon, headers: dict[str, str], status: int
) -> None:
    own = f"127.0.0.1:{daemon.port}"
    filled = {name: value.replace("{own}", own) for name, value in headers.items()}
    answer = httpx.post(daemon.url + COMPLETE, json={"prompt": "a", "max_tokens": 1}, headers=filled)
    assert answer.status_code == status


def test_nobody_is_allowed_to_read_from_another_origin(daemon: RunningDaemon) -> None:
    origin = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    preflight = httpx.request("OPTIONS", daemon.url + CHAT, headers=origin)
    assert preflight.status_code == 403
    for answer in (preflight, httpx.get(daemon.url + "/v1/models", headers=origin)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/nothing"])
def test_every_answer_has_its_security_headers(daemon: RunningDaemon, path: str) -> None:
    headers = httpx.get(daemon.url + path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers
    assert headers["date"]


def test_the_page_may_run_its_own_script_only(daemon: RunningDaemon) -> None:
    answer = httpx.get(daemon.url + "/")
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy and "http" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


# --- bodies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_read(daemon: RunningDaemon, kind: str) -> None:
    answer = httpx.post(daemon.url + CHAT, content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_a_compressed_body_is_refused(daemon: RunningDaemon) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert httpx.post(daemon.url + CHAT, content=b"{}", headers=headers).status_code == 415


def too_large() -> Iterator[bytes]:
    for _ in range(3):
        yield b" " * (MAX_BODY // 2)


@pytest.mark.parametrize("content", [b" " * (MAX_BODY + 1), too_large], ids=["declared", "chunked"])
def test_too_large_a_body_is_refused(daemon: RunningDaemon, content: Any) -> None:
    body = content() if callable(content) else content
    headers = {"content-type": "application/json"}
    with httpx.Client() as client:
        answer = client.post(daemon.url + CHAT, content=body, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
        assert client.get(daemon.url + "/healthz").status_code == 200  # the connection goes on


def test_a_body_of_just_the_limit_is_read(daemon: RunningDaemon) -> None:
    content = b'{"prompt": "a", "max_tokens": 1}'.ljust(MAX_BODY)
    headers = {"content-type": "application/json"}
    assert httpx.post(daemon.url + COMPLETE, content=content, headers=headers).status_code == 200


def test_a_huge_declared_body_is_refused_before_it_comes(daemon: RunningDaemon) -> None:
    with connect(daemon) as client:
        client.sendall(request_bytes(CHAT, {}, **{"content-length": "9" * 15}))
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_unknown_paths_and_methods_are_errors_like_all_others(daemon: RunningDaemon) -> None:
    missing = httpx.get(daemon.url + "/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = httpx.get(daemon.url + CHAT)
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"
    assert httpx.get(daemon.url + "/healthz/").status_code == 404  # no redirect to a claimed host


# --- what nobody foresaw ----------------------------------------------------------------------


def test_an_unforeseen_error_goes_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: Request) -> Response:
        raise ValueError("a detail that is nobody's business")

    with Served(broken) as served, caplog.at_level(logging.ERROR):
        answer = httpx.get(f"http://127.0.0.1:{served.port}/")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["code"] == "internal" and error["type"] == "server_error"
    assert "detail" not in answer.text and "Traceback" not in answer.text
    (record,) = caplog.records
    assert record.name == "edgert.http" and record.exc_info is not None


# --- metrics --------------------------------------------------------------------------


def test_metrics_count_what_was_answered(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with RunningDaemon(tmp_path) as fresh:
        for _ in range(2):
            httpx.post(fresh.url + COMPLETE, json={"prompt": "Once upon a time", "max_tokens": 5}, timeout=30)
        until(lambda: finished(fresh) == {"length": 2})
        page = httpx.get(fresh.url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert samples["edgert_requests_total", "length"] == 2
    assert samples["edgert_generated_tokens_total", None] == 10
    assert samples["edgert_reused_tokens_total", None] > 0
    assert samples["edgert_ready", None] == 1
    assert samples["edgert_memory_bytes", None] > 1e6
