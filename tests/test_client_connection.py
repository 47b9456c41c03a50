"""How the clients reach a daemon: tokens, addresses, TLS, a daemon that is away or has too much to do."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
from grpc_fixture import RAMBLING, GrpcDaemon, config_of
from grpc_stubs import wait_until

from edge_runtime.client import AsyncClient, Client, Status
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.runtime_file import claim
from edge_runtime.errors import (
    ConfigError,
    ForbiddenError,
    OverloadedError,
    UnauthenticatedError,
    UnavailableError,
)

PROMPT = "The home of Paul Colton is in"


def test_a_full_queue_says_when_to_try_again(tmp_path: Path) -> None:
    config = config_of(model={"sequences": 1}, scheduling={"queue": 1})
    with GrpcDaemon(tmp_path, config) as daemon, Client(daemon.address) as client:
        running = client.generate(PROMPT, **RAMBLING)
        next(running)
        waiting = client.generate(PROMPT, **RAMBLING)
        with pytest.raises(OverloadedError) as refused:
            client.generate(PROMPT)
        assert refused.value.retry_after >= 1
        running.close()
        waiting.close()


def test_tokens_and_scopes(tmp_path: Path) -> None:
    config = config_of(server={"require_token": True})
    with GrpcDaemon(tmp_path, config) as daemon:
        user, admin = daemon.token("user", Scope.INFER), daemon.token("root", Scope.ADMIN)
        with (
            Client(daemon.address) as nobody,
            pytest.raises(UnauthenticatedError, match="edgert token create"),
        ):
            nobody.status()
        with Client(daemon.address, "edgert_wrong") as stranger, pytest.raises(UnauthenticatedError):
            stranger.generate(PROMPT)
        with Client(daemon.address, user) as one, Client(daemon.address, admin) as other:
            with other.generate(PROMPT, **RAMBLING) as stream:
                next(stream)
                assert one.status().requests == ()
                assert [request.client for request in other.status().requests] == ["root"]
            for call in (one.shutdown, lambda: one.models.load("demo"), lambda: one.models.unload("demo")):
                with pytest.raises(ForbiddenError, match="admin"):
                    call()
            with pytest.raises(ForbiddenError, match="admin"):
                next(one.models.pull("hf:a/b/c.gguf"))
            assert daemon.shutdowns == 0
            other.shutdown()
            assert daemon.shutdowns == 1
            assert user not in repr(one) and user not in repr(one._connection)


def test_no_daemon_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with Client(address) as client, pytest.raises(UnavailableError, match="edgert serve"):
        client.generate(PROMPT)
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    for kind in (Client, AsyncClient):
        with pytest.raises(UnavailableError, match="edgert serve"):
            kind.local()


def test_a_daemon_that_ends_and_one_that_begins(tmp_path: Path) -> None:
    daemon = GrpcDaemon(tmp_path / "one")
    port = daemon.server.port
    with Client(daemon.address) as client:
        stream = client.generate(PROMPT, **RAMBLING)
        next(stream)
        daemon.stop(0.0)
        with pytest.raises(UnavailableError):
            stream.text()
        with pytest.raises(UnavailableError):
            client.status()
        with GrpcDaemon(tmp_path / "two", address=f"127.0.0.1:{port}"):
            wait_until(lambda: answers(client), "the client finds the new daemon")


def answers(client: Client) -> bool:
    try:
        return isinstance(client.status(), Status)
    except UnavailableError:
        return False


def test_local_finds_the_daemon_and_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        claim(tmp_path) as claimed,
    ):
        claimed.write(http="", grpc=f"0.0.0.0:{daemon.server.port}", version="1")
        with Client.local() as client, pytest.raises(UnauthenticatedError):
            client.status()
        (tmp_path / "token").write_text(daemon.token("own", Scope.ADMIN) + "\n")
        with Client.local(timeout=30) as client:
            assert client.address == daemon.address
            assert client.status().pid == os.getpid()

        async def use() -> None:
            async with AsyncClient.local() as client:
                assert (await client.status()).pid == os.getpid()

        asyncio.run(use())
        claimed.write(http="127.0.0.1:1", grpc="", version="1")
        with pytest.raises(UnavailableError, match=r"server\.grpc"):
            Client.local()


def test_tls_with_the_daemons_own_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    from edge_runtime.daemon.certificate_authority import ensure_authority, issue_server
    from edge_runtime.daemon.certificates import ServerTLS, TLSFiles

    authority, _ = ensure_authority(tmp_path)
    issue_server(tmp_path, authority, ["127.0.0.1"])
    folder = tmp_path / "tls"
    files = TLSFiles(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    tls = ServerTLS(files)
    with GrpcDaemon(tmp_path, credentials=tls.grpc_credentials()) as daemon:
        token = daemon.token("own", Scope.ADMIN)
        with Client(daemon.address, token, folder / "ca.pem") as client:
            assert client.generate(PROMPT, max_tokens=2).text()
        issue_server(tmp_path, authority, ["127.0.0.1", "other.example"])
        assert tls.reload()
        with Client(daemon.address, token, folder / "ca.pem") as client:
            assert client.status().pid == os.getpid()
        with Client(daemon.address, token) as plain, pytest.raises(UnavailableError):
            plain.status()
        ensure_authority(tmp_path / "stranger")
        other = tmp_path / "stranger" / "tls" / "ca.pem"
        with (
            Client(daemon.address, token, other) as mistrusting,
            pytest.raises(UnavailableError, match="TLS"),
        ):
            mistrusting.status()


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":1", "localhost:x", "localhost:70000"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client(address)


def test_a_token_never_travels_in_the_clear(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.pem") as refused:
        Client("192.0.2.1:8421", "edgert_secret")
    assert "edgert_secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="characters") as refused:
        Client(token="edgert\nsecret")
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        Client(ca=tmp_path / "absent.pem")
    (tmp_path / "key.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="PEM"):
        Client(ca=tmp_path / "key.pem")
