"""The daemon's state: one SQLite database, whole after a power cut, shared with the command line."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from edge_runtime.daemon.private_files import make_file
from edge_runtime.errors import ConfigError
from edge_runtime.model_store.files import exclusive

APPLICATION_ID = 0x45444752  # "EDGR": how the file says whose it is
STATE_NAME = "state.db"  # in the home folder
STATE_NAME = "state.db"  # in the home folder
BUSY_SECONDS = 10.0

# Append only: a database remembers how many of them it has had, and their names.
MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "tokens",
        (
            """
            CREATE TABLE tokens (
                id INTEGER PRIMARY KEY AUTOINCREMENT,
                name TEXT NOT NULL UNIQUE,
                scopes TEXT NOT NULL,
                digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
                created REAL NOT NULL,
                expires REAL,
                last_used REAL
            ) STRICT
            """,
        ),
    ),
)


def open_state(path: Path) -> sqlite3.Connection:
    """Open the state: made where it is missing (mode 0600, its folder 0700), brought up to date if older.

    Every commit is on the disk when it returns (``synchronous=FULL``): a token that somebody was shown must
    not vanish with the power, and there are too few writes for the cost to matter.

    Raises:
        ConfigError: it is damaged, of a newer program, another program's, or may not be opened.
    """
    with _explained(path):
        _make_file(path)
        state = sqlite3.connect(path, timeout=BUSY_SECONDS)
        try:
            state.execute("PRAGMA foreign_keys = ON")
            state.execute("PRAGMA synchronous = FULL")
            if not _is_current(state, path):
                # SQLite itself does not wait when two programs want to switch to WAL at the same time.
                lock = path.with_name(f"{path.name}.lock")
                make_file(lock)
                with exclusive(lock, wait=True):
                    _migrate(state, path)
        except BaseException:
            state.close()
            raise
    return state


@contextmanager
def opened_state(path: Path) -> Iterator[sqlite3.Connection]:
    """The state for one piece of work, which is kept as a whole or not at all.

    Raises:
        ConfigError: as :func:`open_state`; also for damage that shows only now.
    """
    with closing(open_state(path)) as state, _explained(path), state:
        yield state


def check_state(path: Path) -> None:
    """Read the whole database and look for damage; makes nothing where there is none.

    Raises:
        ConfigError: as :func:`open_state`.
    """
    if not path.exists():
        return
    with opened_state(path) as state:
        (found,) = state.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise _damaged(path, str(found))


def _make_file(path: Path) -> None:
    try:
        # SQLite would make it readable to all; it gives its -wal and -shm files mode and owner of this one.
        make_file(path)
    except OSError as error:
        raise _not_opened(path, str(error.strerror)) from error


def _is_current(state: sqlite3.Connection, path: Path) -> bool:
    """Whether all migrations are in it and WAL is on; refuses what this program must not touch."""
    state.execute("BEGIN")  # one snapshot: another program may be making the tables right now
    (application,) = state.execute("PRAGMA application_id").fetchone()
    (version,) = state.execute("PRAGMA user_version").fetchone()
    (tables,) = state.execute("SELECT count(*) FROM sqlite_master").fetchone()
    state.execute("COMMIT")
    if application == 0 and version == 0 and tables == 0:
        return False
    if application != APPLICATION_ID:
        raise ConfigError(
            f"{path} is a database of another program (application id {application:#x}); "
            "move it away, or set EDGERT_HOME to another folder"
        )
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{path} was written by a newer edgert (state version {version}, this one knows {len(MIGRATIONS)}"
            "); install that version again, or set EDGERT_HOME to another folder"
        )
    (mode,) = state.execute("PRAGMA journal_mode").fetchone()
    return bool(version == len(MIGRATIONS) and mode == "wal")


def _migrate(state: sqlite3.Connection, path: Path) -> None:
    if _is_current(state, path):
        return  # another program did it while this one waited
    state.execute("PRAGMA journal_mode = WAL").fetchone()
    state.execute("BEGIN IMMEDIATE")
    with state:
        (version,) = state.execute("PRAGMA user_version").fetchone()
        if version == 0:
            state.execute(
                "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied REAL NOT NULL) STRICT"
            )
            state.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        for name, statements in MIGRATIONS[version:]:
            for statement in statements:
                state.execute(statement)
            state.execute("INSERT INTO migrations (name, applied) VALUES (?, ?)", (name, time.time()))
        state.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, apart from broken constraints, which are for the caller."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.OperationalError as error:
        if "disk image" in str(error) or "malformed" in str(error):
            raise _damaged(path, str(error)) from error
        raise _not_opened(path, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the state database {path} is damaged ({' '.join(why.split())}); stop the daemon, move it away "
        f"together with {path.name}-wal and {path.name}-shm (or put back a copy of all three), and make new "
        "tokens with `edgert token create`"
    )


def _not_opened(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the state database {path} cannot be used ({why}); it needs free space and a user who may read and "
        "write it and its folder; EDGERT_HOME chooses another one"
    )
