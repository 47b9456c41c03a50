"""The daemon's state: one SQLite database, shared with the command line."""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

from edge_runtime.database import Schema, check_database, open_database, opened

APPLICATION_ID = 0x45444752  # "EDGR": how the file says whose it is
STATE_NAME = "state.db"  # in the home folder

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
    """Open the state as :func:`edge_runtime.database.open_database` does.

    Raises:
        ConfigError: it is damaged, of a newer program, another program's, or may not be opened.
    """
    return open_database(path, _schema())


def opened_state(path: Path) -> AbstractContextManager[sqlite3.Connection]:
    """The state for one piece of work, which is kept as a whole or not at all.

    Raises:
        ConfigError: as :func:`open_state`; also for damage that shows only now.
    """
    return opened(path, _schema())


def check_state(path: Path) -> None:
    """Read the whole database and look for damage; makes nothing where there is none.

    Raises:
        ConfigError: as :func:`open_state`.
    """
    check_database(path, _schema())


def _schema() -> Schema:
    return Schema("state", APPLICATION_ID, MIGRATIONS, "make new tokens with `edgert token create`")
