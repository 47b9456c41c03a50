"""The state database on real files: made, brought up to date, refused, shared, killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from program import REPOSITORY, wait_until

from edge_runtime.daemon import state
from edge_runtime.daemon.auth import Scope, digest_of
from edge_runtime.daemon.state import check_state, open_state, opened_state
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "state.db"


def test_it_is_made_private(path: Path) -> None:
    before = os.umask(0)
    try:
        with opened_state(path) as opened:
            opened.execute("INSERT INTO migrations VALUES ('x', 1)")
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.glob("state.db*")}
    finally:
        os.umask(before)
    assert {name: modes[name] for name in ("state.db", "state.db-wal", "state.db-shm")} == {
        "state.db": 0o600,
        "state.db-wal": 0o600,
        "state.db-shm": 0o600,
    }
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_too_wide_permissions_are_narrowed(path: Path) -> None:
    open_state(path).close()
    path.chmod(0o644)
    open_state(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_its_settings_keep_what_was_committed(path: Path) -> None:
    for _ in range(2):  # new, and again
        with closing(open_state(path)) as opened:
            found = {
                name: opened.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "user_version")
            }
        assert found == {
            "journal_mode": "wal",
            "synchronous": 2,  # FULL
            "foreign_keys": 1,
            "busy_timeout": 10000,
            "user_version": len(state.MIGRATIONS),
        }


def test_migrations_are_applied_once_in_order_and_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = TokenStore(path)
    token.create("kept", [Scope.INFER])
    more = (("notes", ("CREATE TABLE notes (text TEXT)", "INSERT INTO notes VALUES ('one')")),)
    monkeypatch.setattr(state, "MIGRATIONS", (*state.MIGRATIONS, *more))
    for _ in range(2):
        with closing(open_state(path)) as opened:
            assert opened.execute("SELECT text FROM notes").fetchall() == [("one",)]
            names = [name for (name,) in opened.execute("SELECT name FROM migrations ORDER BY rowid")]
    assert names == ["tokens", "notes"]
    assert [kept.name for kept in token] == ["kept"]


def test_a_failing_migration_leaves_everything_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_state(path).close()
    broken = (("broken", ("CREATE TABLE half (a)", "INSERT INTO nowhere VALUES (1)")),)
    with monkeypatch.context() as patch:
        patch.setattr(state, "MIGRATIONS", (*state.MIGRATIONS, *broken))
        with pytest.raises(ConfigError, match="nowhere"):
            open_state(path)
    with closing(open_state(path)) as opened:
        tables = {name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert "tokens" in tables
    assert "half" not in tables


def test_a_newer_state_is_refused_and_untouched(path: Path) -> None:
    with closing(open_state(path)) as opened, opened:
        opened.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"newer edgert \(state version 99, this one knows 1\)"):
        open_state(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_untouched(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another program"):
        open_state(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["nonsense", "middle", "short"])
def test_damage_is_said_and_nothing_deleted(path: Path, damage: str) -> None:
    tokens = TokenStore(path)
    for number in range(200):
        tokens.create(f"token-{number}", [Scope.INFER])
    content = bytearray(path.read_bytes())
    if damage == "nonsense":
        content[:] = b"this is no database " * 100
    elif damage == "middle":
        content[4096 * 4 : 4096 * 6] = os.urandom(8192)
    else:
        del content[4096 * 3 :]
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .* stop the daemon, move it away"):
        check_state(path)
    assert path.read_bytes() == content


def test_checking_makes_nothing_and_a_sound_one_passes(path: Path) -> None:
    check_state(path)
    assert not path.parent.exists()
    open_state(path).close()
    check_state(path)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be used .*EDGERT_HOME"):
        open_state(tmp_path / "file" / "state.db")
    with pytest.raises(ConfigError, match=r"cannot be used .*EDGERT_HOME"):
        open_state(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "another's"
    target.write_text("")
    target.chmod(0o644)
    (tmp_path / "state.db").symlink_to(target)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_state(tmp_path / "state.db")
    assert target.read_text() == ""
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_many_may_make_it_at_once(path: Path) -> None:
    program = (
        f"from pathlib import Path; from edge_runtime.daemon.state import *; open_state(Path({str(path)!r}))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()


def test_threads_may_make_it_at_the_same_moment(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def make(number: int) -> None:
        together.wait()
        open_state(tmp_path / f"state-{number // 4}.db").close()

    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(make, range(80)):
            assert done is None


def test_a_reader_does_not_wait_for_a_writer(path: Path) -> None:
    tokens = TokenStore(path)
    tokens.create("first", [Scope.INFER])
    with opened_state(path) as writing:
        writing.execute("UPDATE tokens SET last_used = 1")
        assert [(token.name, token.last_used) for token in tokens] == [("first", None)]
    assert [token.last_used for token in tokens] == [1.0]


@pytest.mark.parametrize("round_", range(3))
def test_kill_in_the_midst_of_writing_loses_nothing_that_was_promised(path: Path, round_: int) -> None:
    """kill -9 a process that makes tokens in a loop; it writes each name when create() has returned."""
    program = f"""
import os
from pathlib import Path
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.tokens import TokenStore
tokens = TokenStore(Path({str(path)!r}))
number = 0
while True:
    secret = tokens.create(f"token-{{number}}", [Scope.INFER])
    os.write(1, f"token-{{number}} {{secret}}\\n".encode())
    number += 1
"""
    promised_at = path.parent.parent / "promised"
    with promised_at.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=out)
        try:
            wait_until(lambda: promised_at.read_text().count("\n") >= 10 + 7 * round_)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    promised = dict(line.split() for line in promised_at.read_text().splitlines())
    check_state(path)
    found = {token.name: token.digest for token in TokenStore(path)}

    assert len(promised) >= 10
    assert {name: digest_of(secret) for name, secret in promised.items()}.items() <= found.items()
    assert len(found) <= len(promised) + 1
    TokenStore(path).create("after", [Scope.INFER])
