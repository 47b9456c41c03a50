"""``edgert token`` as a program, beside processes that stand for a running daemon."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import REPOSITORY, Program, wait_until

from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import UnauthenticatedError


def gate_of(edgert: Program) -> Gate:
    return Gate(TokenStore(edgert.home / "state.db"), require_token=True)


@pytest.fixture
def daemon(edgert: Program, tmp_path: Path) -> Iterator[Path]:
    """A process that claims the home as the daemon does; gives the file in which it counts SIGHUPs."""
    heard = tmp_path / "heard"
    program = f"""
import signal, time
from pathlib import Path
from edge_runtime.daemon.runtime_file import claim
def hear(number, frame):
    with open({str(heard)!r}, "a") as file:
        file.write("reload\\n")
signal.signal(signal.SIGHUP, hear)
with claim(Path({str(edgert.home)!r})) as runtime:
    runtime.write(http="127.0.0.1:1", grpc="", version="0")
    Path({str(heard)!r}).touch()
    while True:
        time.sleep(1)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    try:
        wait_until(heard.exists)
        yield heard
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_created_token_is_let_in_and_a_revoked_one_is_not(edgert: Program) -> None:
    done = edgert("token", "create", "phone", "--scope", "infer", "--scope", "personalize")
    assert done.code == 0, done.err
    token = done.out.strip()
    assert done.out == f"{token}\n"
    assert "shown this once" in done.err
    identity = gate_of(edgert).admit(token, "10.0.0.7", Scope.PERSONALIZE)
    assert (identity.name, identity.scopes) == ("phone", {Scope.INFER, Scope.PERSONALIZE})
    done = edgert("token", "revoke", "phone")
    assert (done.code, done.out) == (0, "revoked phone\n")
    with pytest.raises(UnauthenticatedError):
        gate_of(edgert).admit(token, "10.0.0.7", Scope.INFER)


def test_json_and_the_default_scope(edgert: Program) -> None:
    done = edgert("token", "create", "phone", "--expires-days", "2", "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert set(facts) == {"name", "scopes", "expires", "token", "in_force"}
    assert (facts["name"], facts["scopes"], facts["in_force"]) == ("phone", ["infer"], True)
    assert facts["expires"] == pytest.approx(time.time() + 2 * 86400, abs=60)
    assert gate_of(edgert).admit(facts["token"], "", Scope.INFER)
    (listed,) = edgert("token", "list", "--json").json["tokens"]
    assert set(listed) == {"name", "scopes", "created", "expires", "last_used"}
    assert listed["expires"] == facts["expires"]
    assert edgert("token", "revoke", "phone", "--json").json == {"name": "phone", "in_force": True}


def test_the_list_shows_no_token(edgert: Program) -> None:
    assert "edgert token create" in edgert("token", "list").out
    assert not edgert.home.exists()
    token = edgert("token", "create", "phone", "--scope", "admin").out.strip()
    store = TokenStore(edgert.home / "state.db")
    store.create("old", [Scope.INFER], expires=time.time() + 0.05)
    time.sleep(0.1)
    done = edgert("token", "list")
    header, old, phone = done.out.splitlines()
    assert header.split() == ["NAME", "SCOPES", "CREATED", "EXPIRES", "LAST", "USED"]
    assert old.split()[:2] == ["old", "infer"]
    assert "expired" in old
    assert phone.split()[:2] == ["phone", "admin"]
    assert phone.split()[-2:] == ["never", "never"]
    for text in (done.out, edgert("token", "list", "--json").out):
        assert token.removeprefix("edgert_") not in text
        assert next(iter(store)).digest.hex() not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a b"], "no token name"),
        (["create", "local"], "callers without a token"),
        (["create", "phone", "--scope", "root"], "'root' is not one of 'infer', 'personalize', 'admin'"),
        (["create", "phone", "--expires-days", "0"], "0"),
        (["create", "phone", "--expires-days", "nan"], "expired before its first use"),
        (["create", "taken"], "a token named 'taken' already"),
        (["revoke", "phone"], "no token named 'phone'"),
    ],
)
def test_mistakes_are_said(edgert: Program, arguments: list[str], says: str) -> None:
    TokenStore(edgert.home / "state.db").create("taken", [Scope.INFER])
    done = edgert("token", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert says in done.err
    assert "Traceback" not in done.err
    assert [token.name for token in TokenStore(edgert.home / "state.db")] == ["taken"]


def test_a_damaged_database_is_a_clear_error(edgert: Program) -> None:
    edgert.home.mkdir()
    (edgert.home / "state.db").write_bytes(b"nonsense" * 1000)
    done = edgert("token", "list", "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "config"
    assert "is damaged" in done.json["error"]["message"]


def test_a_running_daemon_is_told(edgert: Program, daemon: Path) -> None:
    done = edgert("token", "create", "phone")
    assert done.code == 0
    assert "reads it now" in done.err
    wait_until(lambda: daemon.read_text() == "reload\n")
    assert edgert("token", "revoke", "phone").code == 0
    wait_until(lambda: daemon.read_text() == "reload\n" * 2)
    edgert("token", "list")
    edgert("token", "revoke", "phone")
    time.sleep(0.1)
    assert daemon.read_text() == "reload\n" * 2


def test_what_a_killed_daemon_left_is_not_signalled(edgert: Program) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        edgert.home.mkdir()
        (edgert.home / "daemon.lock").write_text(f"{bystander.pid}\n")
        (edgert.home / "daemon.json").write_text(
            f'{{"pid": {bystander.pid}, "http": "127.0.0.1:1", "grpc": "", "tls": false, "ca": "", '
            '"started": 1.0, "version": "0"}'
        )
        done = edgert("token", "create", "phone")
        assert done.code == 0
        assert "reads it now" not in done.err
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")
    assert bystander.returncode == 0
