"""Connections to the HTTP server: clients that leave, that are slow, that are too many; its start and end."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from daemon_fixture import (
    COMPLETE,
    LONG,
    PROMPT,
    RunningDaemon,
    Served,
    connect,
    finished,
    request_bytes,
    running,
    small_config,
    until,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.daemon import http_protocol
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.http_server import HttpServer
from edge_runtime.errors import ConfigError

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with RunningDaemon(tmp_path_factory.mktemp("http")) as running:
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
        began = time.monotonic()
        slow.thread.run(slow.server.stop(0.1))
        assert time.monotonic() - began < 2  # the answer would take longer
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


# --- the start


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
            received = b""
            while not received.endswith(b"ok\n"):
                received += client.recv(4096)
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
        refused = b""
        while part := client.recv(4096):
            refused += part
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused
        assert json.loads(refused.split(b"\r\n\r\n")[1])["error"]["code"] == "overloaded"
    for client in many:
        client.close()
    until(lambda: daemon.server.connections == 0)
    assert httpx.get(daemon.url + "/healthz").status_code == 200


# --- TLS


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
