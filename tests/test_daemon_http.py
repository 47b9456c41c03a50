"""The HTTP server's edges: who is let in, what is refused, and that a client which leaves frees its place."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_fixture import LoopThread, RunningDaemon, small_config
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_runtime.daemon import http_protocol
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.http_boundary import Boundary
from edge_runtime.daemon.http_server import HttpServer
from edge_runtime.errors import ConfigError

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
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


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, some milliseconds a token, and a context that takes half a minute to fill."""
    from models.synthetic import SyntheticModel, write_synthetic_gguf

    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    shape = {"n_layers": 4, "n_embd": 512, "n_ff": 2048, "n_head": 8, "n_head_kv": 2, "n_vocab": 384}
    write_synthetic_gguf(path, SyntheticModel(architecture="llama", n_ctx=4096, quantization="F32", **shape))
    return path


@pytest.fixture
def slow(tmp_path: Path, slow_model: Path) -> Iterator[RunningDaemon]:
    """One place, and room for one more request to wait."""
    config = small_config(default=str(slow_model), context=4096, sequences=1, queue=1)
    with RunningDaemon(tmp_path, config) as running:
        yield running


# A prompt after which the random model does not happen to end its answer for a thousand tokens.
PROMPT = [18, 19, 20]
LONG = {"prompt": PROMPT, "max_tokens": 4000, "temperature": 0}


def until(condition: Callable[[], Any], seconds: float = 5.0) -> float:
    """Wait until something is so; returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came to be"
        time.sleep(0.002)
    return time.monotonic() - began


def running(daemon: RunningDaemon) -> int:
    return len(daemon.thread.call(daemon.service.status).requests)


def finished(daemon: RunningDaemon) -> dict[str, int]:
    return daemon.thread.call(daemon.service.status).finished


def request_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content))}
    fields = "".join(f"{name}: {value}\r\n" for name, value in (lines | headers).items())
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode() + content


def connect(daemon: RunningDaemon) -> socket.socket:
    return socket.create_connection((daemon.host, daemon.port), timeout=10)


# --- a client that leaves ---------------------------------------------------------------------


def test_leaving_a_stream_frees_its_place_within_a_token(slow: RunningDaemon) -> None:
    with connect(slow) as client:
        client.sendall(request_bytes(COMPLETE, LONG | {"stream": True}))
        received = b""
        while received.count(b"data: ") < 5:
            received += client.recv(4096)
        before = slow.thread.call(slow.service.status).generated_tokens
    # The limit is a few tokens of about 5 ms each and the poll's own pace, on a machine that is busy.
    assert until(lambda: running(slow) == 0) < 1.0
    after = slow.thread.call(slow.service.status).generated_tokens
    assert after - before < 30
    assert finished(slow) == {"cancelled": 1}


@pytest.mark.parametrize("half", [False, True], ids=["closed", "half closed"])
def test_leaving_while_the_whole_answer_is_computed_frees_the_place(slow: RunningDaemon, half: bool) -> None:
    with connect(slow) as client:
        client.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 1)
        if half:
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        assert until(lambda: running(slow) == 0) < 1.0
    assert finished(slow) == {"cancelled": 1}


def test_leaving_the_queue_frees_the_place_in_it(slow: RunningDaemon) -> None:
    with connect(slow) as first, connect(slow) as second:
        first.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 1)
        second.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 2)
        second.close()
        until(lambda: running(slow) == 1)
        assert finished(slow) == {"cancelled": 1}
        with connect(slow) as third:
            third.sendall(request_bytes(COMPLETE, LONG))
            until(lambda: running(slow) == 2)
    until(lambda: running(slow) == 0)


def test_a_reset_connection_frees_the_place(slow: RunningDaemon) -> None:
    client = connect(slow)
    client.sendall(request_bytes(COMPLETE, LONG | {"stream": True}))
    client.recv(100)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # RST instead of FIN
    client.close()
    assert until(lambda: running(slow) == 0) < 1.0


def test_all_prompts_of_a_request_end_when_its_client_leaves(tmp_path: Path, slow_model: Path) -> None:
    body = LONG | {"prompt": [PROMPT] * 4, "stream": True}
    config = small_config(default=str(slow_model), context=4096, sequences=2)
    with RunningDaemon(tmp_path, config) as daemon:
        with connect(daemon) as client:
            client.sendall(request_bytes(COMPLETE, body))
            until(lambda: running(daemon) == 4)
            client.recv(100)
        until(lambda: running(daemon) == 0)
        assert finished(daemon) == {"cancelled": 4}


def test_a_full_queue_refuses_and_says_when_to_come_back(slow: RunningDaemon) -> None:
    with connect(slow) as first, connect(slow) as second:
        first.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 1)
        second.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 2)
        answer = httpx.post(slow.url + COMPLETE, json=LONG, timeout=10)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_batch_that_does_not_fit_the_queue_leaves_nothing_behind(slow: RunningDaemon) -> None:
    answer = httpx.post(slow.url + COMPLETE, json=LONG | {"prompt": [PROMPT] * 8}, timeout=10)
    assert answer.status_code == 429
    until(lambda: running(slow) == 0)


def test_an_error_within_a_stream_is_its_last_event(slow: RunningDaemon) -> None:
    answer = httpx.post(slow.url + COMPLETE, json=LONG | {"stream": True, "timeout": 0.5}, timeout=10)
    assert answer.status_code == 200
    events = answer.text.rstrip("\n").split("\n\n")
    assert len(events) > 2
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "deadline_exceeded"
    assert "[DONE]" not in answer.text


def test_stopping_lets_an_answer_finish(slow: RunningDaemon) -> None:
    async def stop() -> None:
        await slow.server.stop(20)

    with connect(slow) as client:
        client.sendall(request_bytes(COMPLETE, LONG | {"max_tokens": 60}))
        until(lambda: running(slow) == 1)
        slow.thread.run(stop())
        received = b""
        while part := client.recv(4096):
            received += part
    assert received.startswith(b"HTTP/1.1 200") and b'"completion_tokens":60' in received
    with pytest.raises(ConnectionRefusedError):
        connect(slow)


def test_stopping_cuts_what_takes_too_long(slow: RunningDaemon) -> None:
    with connect(slow) as client:
        client.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 1)
        slow.thread.run(slow.server.stop(0.1))
        until(lambda: running(slow) == 0)
        assert slow.server.connections == 0


def test_a_stopped_service_is_unavailable(tmp_path: Path) -> None:
    with RunningDaemon(tmp_path) as stopping:
        stopping.thread.run(stopping.service.stop(0))
        answer = httpx.post(stopping.url + COMPLETE, json={"prompt": "a"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "unavailable"
        ready = httpx.get(stopping.url + "/readyz")
        assert ready.status_code == 503 and "stopping" in ready.text
        assert httpx.get(stopping.url + "/healthz").status_code == 200


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


def test_others_requests_stay_anonymous(slow: RunningDaemon) -> None:
    """A token without the admin scope sees that something runs, not whose it is."""
    curious, admin = slow.token("curious"), slow.token("admin", Scope.ADMIN)

    def seen_by(token: str) -> dict[str, Any]:
        status = httpx.get(slow.url + "/api/status", headers={"authorization": f"Bearer {token}"})
        (request,) = status.json()["requests"]
        return dict(request)

    with connect(slow) as client:
        client.sendall(request_bytes(COMPLETE, LONG))
        until(lambda: running(slow) == 1)
        assert seen_by(curious)["client"] == seen_by(curious)["id"] == ""
        assert seen_by(admin)["client"] == "127.0.0.1"
        assert seen_by(admin)["id"]


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


class Served:
    """An application of one path behind the boundary, on a real socket."""

    def __init__(self, endpoint: Any) -> None:
        app = Starlette(routes=[Route("/", endpoint, methods=["GET"])], middleware=[Middleware(Boundary)])
        self.thread = LoopThread()
        self.server = HttpServer(app)
        self.port = self.thread.run(self.server.start("127.0.0.1", 0))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.run(self.server.stop(0.1))
        self.thread.close()


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


def test_an_address_in_use_is_a_wrong_setting(daemon: RunningDaemon) -> None:
    async def start(host: str, port: int) -> None:
        await HttpServer(Starlette()).start(host, port)

    with pytest.raises(ConfigError, match="address already in use"):
        daemon.thread.run(start("127.0.0.1", daemon.port))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        daemon.thread.run(start("192.0.2.1", 0))


# --- slow clients -----------------------------------------------------------------------------


def closed_after(client: socket.socket) -> float:
    """Seconds until the server closes the connection."""
    began = time.monotonic()
    try:
        while client.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\n",
        request_bytes(CHAT, {}, **{"content-length": "100"}),
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he",
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        + request_bytes(CHAT, {}, **{"content-length": "9"}),
    ],
    ids=["nothing", "half a head", "half a body", "half a second head", "half a second body"],
)
def test_a_request_has_to_arrive_in_time(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.3)
    with connect(daemon) as client:
        client.sendall(sent)
        assert 0.1 < closed_after(client) < 3
    until(lambda: daemon.server.connections == 0)


def test_sending_little_by_little_does_not_help(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.4)
    began = time.monotonic()
    with connect(daemon) as client, pytest.raises(OSError):
        client.sendall(b"GET / HTTP/1.1\r\nx: ")
        while time.monotonic() - began < 5:
            client.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - began < 2


def test_a_connection_waits_longer_between_two_requests(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.1)
    with connect(daemon) as client:
        for _ in range(2):
            client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)


def test_a_reader_who_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "STALL_SECONDS", 0.3)

    async def endless(_: Request) -> Response:
        return Response(b"x" * (64 << 20))

    with Served(endless) as served, socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until(lambda: served.server.connections == 1)
        assert until(lambda: served.server.connections == 0) < 3


def test_there_are_only_so_many_connections(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    until(lambda: daemon.server.connections == 0)
    many = [connect(daemon) for _ in range(3)]
    until(lambda: daemon.server.connections == 3)
    with connect(daemon) as client:
        refused = client.recv(4096)
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused
        assert json.loads(refused.split(b"\r\n\r\n")[1])["error"]["code"] == "overloaded"
    for client in many:
        client.close()
    until(lambda: daemon.server.connections == 0)
    assert httpx.get(daemon.url + "/healthz").status_code == 200


# --- metrics and TLS --------------------------------------------------------------------------


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


def test_tls_is_spoken_and_renewed(tmp_path: Path) -> None:
    """A context that gets another certificate uses it for the next connection."""
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*first)
    config = small_config(preload=False)
    with RunningDaemon(tmp_path, config, ssl_context=context) as secured:
        assert ask_securely(secured, first[0]) == 200
        context.load_cert_chain(*second)
        assert ask_securely(secured, second[0]) == 200
        with pytest.raises(httpx.ConnectError):
            ask_securely(secured, first[0])
        with connect(secured) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200" not in plain.recv(4096)


def ask_securely(daemon: RunningDaemon, trusted: Path) -> int:
    context = ssl.create_default_context(cafile=str(trusted))
    with httpx.Client(verify=context) as client:
        return client.get(daemon.url + "/healthz").status_code


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem, secret
