"""``edgert init`` as a program, and a server that uses what it made."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from program import Program

from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.certificates import ServerTLS, check_exposure, tls_files, token_required
from edge_runtime.daemon.config_file import load_config
from edge_runtime.daemon.tokens import TokenStore

FILES = ("tls/ca.pem", "tls/ca.key", "tls/server.pem", "tls/server.key", "token", "edgert.toml")


def contents(home: Path) -> dict[str, bytes]:
    return {name: (home / name).read_bytes() for name in FILES}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_made_private_and_works_together(edgert: Program) -> None:
    done = edgert("init", "--listen", "0.0.0.0", "--host", "Pi.Home.Arpa", "--host", "10.1.2.3")
    assert done.code == 0, done.err
    home = edgert.home
    assert {name: mode(home / name) for name in (".", "tls", *FILES, "state.db")} == {
        ".": 0o700,
        "tls": 0o700,
        "tls/ca.pem": 0o644,
        "tls/ca.key": 0o600,
        "tls/server.pem": 0o644,
        "tls/server.key": 0o600,
        "token": 0o600,
        "edgert.toml": 0o644,
        "state.db": 0o600,
    }
    config = load_config(home / "edgert.toml", {}, {})
    assert (config.server.http, config.server.grpc) == ("0.0.0.0:8420", "0.0.0.0:8421")
    check_exposure(config, home)
    assert token_required(config)
    token = (home / "token").read_text().strip()
    gate = Gate(TokenStore(home / "state.db"), require_token=True)
    assert gate.admit(token, "10.0.0.7", Scope.ADMIN).name == "cli"
    files = tls_files(config, home)
    assert files
    assert files.ca == home / "tls" / "ca.pem"
    for name in ("pi.home.arpa", "10.1.2.3", "localhost"):
        _shake_hands(ServerTLS(files).context, files.ca, name)
    for said in (str(files.ca), "edgert token create", "https://pi.home.arpa:8420", "ca.key"):
        assert said in done.out
    assert token not in done.out + done.err


def _shake_hands(server: ssl.SSLContext, ca: Path, name: str) -> None:
    client = ssl.create_default_context(cafile=str(ca))
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with server.wrap_socket(theirs, server_side=True) as tls:
            tls.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    with client.wrap_socket(ours, server_hostname=name) as tls:
        assert tls.recv(5) == b"hello"
    thread.join()


def test_again_changes_nothing_and_says_what_is_there(edgert: Program) -> None:
    first = edgert("init", "--json")
    assert first.code == 0, first.err
    assert first.json["made"] == ["ca", "certificate", "token_file", "config"]
    before = contents(edgert.home)
    times = {name: (edgert.home / name).stat().st_mtime_ns for name in FILES}
    again = edgert("init", "--json")
    assert again.json == {**first.json, "made": []}
    shown = edgert("init")
    assert [line.split()[0] for line in shown.out.splitlines()[:4]] == ["there"] * 4
    assert contents(edgert.home) == before
    assert {name: (edgert.home / name).stat().st_mtime_ns for name in FILES} == times
    assert [token.name for token in TokenStore(edgert.home / "state.db")] == ["cli"]


def test_without_listen_only_this_device_is_served(edgert: Program) -> None:
    done = edgert("init")
    assert "listens on this device alone" in done.out
    config = load_config(edgert.home / "edgert.toml", {}, {})
    assert config.server.http == "127.0.0.1:8420"
    assert tls_files(config, edgert.home) is None
    assert not token_required(config)


def test_renewal_keeps_authority_names_and_tokens(edgert: Program) -> None:
    edgert("init", "--host", "pi.home.arpa")
    before = contents(edgert.home)
    done = edgert("init", "--force-renew", "--json")
    assert done.code == 0, done.err
    assert done.json["made"] == ["certificate"]
    assert "pi.home.arpa" in done.json["hosts"]
    after = contents(edgert.home)
    changed = {name for name in FILES if before[name] != after[name]}
    assert changed == {"tls/server.pem", "tls/server.key"}


def test_a_further_host_gets_into_the_certificate(edgert: Program) -> None:
    edgert("init", "--host", "pi.home.arpa")
    done = edgert("init", "--host", "pi2.home.arpa", "--host", "pi.home.arpa", "--json")
    assert done.json["made"] == ["certificate"]
    assert {"pi.home.arpa", "pi2.home.arpa", "localhost"} <= set(done.json["hosts"])


def test_the_address_of_edited_settings_gets_into_it_too(edgert: Program) -> None:
    edgert("init")
    settings = edgert.home / "edgert.toml"
    settings.write_text(settings.read_text().replace("127.0.0.1:8420", "10.9.8.7:8420"))
    done = edgert("init", "--json")
    assert done.json["made"] == ["certificate"]
    assert "10.9.8.7" in done.json["hosts"]


@pytest.mark.parametrize("half", ["tls/server.pem", "tls/server.key", "tls/ca.pem"])
def test_what_a_crash_left_half_done_is_finished(edgert: Program, half: str) -> None:
    edgert("init")
    (edgert.home / half).unlink()
    done = edgert("init", "--json")
    assert done.code == 0, done.err
    assert "certificate" in done.json["made"]
    tls = edgert.home / "tls"
    client = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    assert client.cert_store_stats()["x509_ca"] == 1
    settings = {"server.http": "0.0.0.0:1"}
    files = tls_files(load_config(edgert.home / "edgert.toml", {}, settings), edgert.home)
    assert files
    _shake_hands(ServerTLS(files).context, tls / "ca.pem", "localhost")


def test_a_lost_or_revoked_token_is_replaced(edgert: Program) -> None:
    edgert("init")
    path = edgert.home / "token"
    first = path.read_text()
    path.unlink()
    assert edgert("init", "--json").json["made"] == ["token_file"]
    second = path.read_text()
    assert second != first
    assert [token.name for token in TokenStore(edgert.home / "state.db")] == ["cli", "cli-2"]
    assert edgert("token", "revoke", "cli-2").code == 0
    done = edgert("init")
    assert "had been revoked" in done.out
    assert path.read_text() not in (first, second)
    path.chmod(0o644)
    assert edgert("init", "--json").json["made"] == []
    assert mode(path) == 0o600


def test_settings_that_are_there_are_left_alone(edgert: Program) -> None:
    edgert.home.mkdir()
    settings = edgert.home / "edgert.toml"
    settings.write_text("# mine\n[model]\nthreads = 3\n")
    assert edgert("init").code == 0
    assert settings.read_text() == "# mine\n[model]\nthreads = 3\n"
    done = edgert("init", "--listen", "0.0.0.0")
    assert done.code == 2
    assert 'http = "0.0.0.0:8420"' in done.err
    assert settings.read_text() == "# mine\n[model]\nthreads = 3\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--listen", "0.0.0.0:8420"], "without port"),
        (["--listen", "nonsense!"], "neither a host name nor an IP address"),
        (["--host", "https://pi"], "neither a host name nor an IP address"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(edgert: Program, arguments: list[str], says: str) -> None:
    done = edgert("init", *arguments)
    assert done.code == 2
    assert says in done.err
    assert not (edgert.home / "tls").exists()
    assert not (edgert.home / "edgert.toml").exists()


def test_damaged_settings_are_said_before_anything_is_made(edgert: Program) -> None:
    edgert.home.mkdir()
    (edgert.home / "edgert.toml").write_text("[server]\nhtpp = 'x'\n")
    done = edgert("init")
    assert done.code == 2
    assert "htpp" in done.err
    assert not (edgert.home / "tls").exists()


def test_a_key_that_others_can_read_is_refused(edgert: Program) -> None:
    edgert("init")
    key = edgert.home / "tls" / "ca.key"
    key.chmod(0o644)
    done = edgert("init")
    assert done.code == 2
    assert f"chmod 600 {key}" in done.err


def test_the_authoritys_key_may_be_kept_elsewhere(edgert: Program, tmp_path: Path) -> None:
    edgert("init")
    key = edgert.home / "tls" / "ca.key"
    key.rename(tmp_path / "ca.key")
    assert edgert("init", "--json").json["made"] == []
    done = edgert("init", "--force-renew")
    assert done.code == 2
    assert "put it back" in done.err
    (tmp_path / "ca.key").rename(key)
    assert edgert("init", "--force-renew", "--json").json["made"] == ["certificate"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator makes files for others")
def test_the_administrator_makes_files_for_the_folders_owner(edgert: Program) -> None:
    edgert.home.mkdir(mode=0o700)
    os.chown(edgert.home, 12345, 12346)
    assert edgert("init").code == 0
    assert edgert("token", "create", "phone").code == 0
    names = [*FILES, "tls", "state.db", "state.db.lock", "init.lock"]
    owners = {name: (edgert.home / name).stat() for name in names}
    assert {(found.st_uid, found.st_gid) for found in owners.values()} == {(12345, 12346)}


def test_two_at_once_make_one_of_everything(edgert: Program) -> None:
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(edgert("init", "--json"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.code for done in outcomes] == [0, 0, 0]
    assert sorted(len(done.json["made"]) for done in outcomes) == [0, 0, 4]
    assert len({done.json["ca_sha256"] for done in outcomes}) == 1
