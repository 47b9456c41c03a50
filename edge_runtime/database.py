"""SQLite databases that are whole after a power cut, and shared between the daemon and the command line."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.model_store.files import exclusive
from edge_runtime.private_files import make_file

BUSY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Schema:
    """What a database is for and how it came to its present form.

    Attributes:
        name: in messages, such as ``state``.
        application_id: 32 bits; how the file says whose it is.
        migrations: (name, statements); append only: a database remembers how many of them it has had, and
            their names.
        remedy: what to do once a damaged one was moved away.
    """

    name: str
    application_id: int
    migrations: tuple[tuple[str, tuple[str, ...]], ...]
    remedy: str


def open_database(path: Path, schema: Schema) -> sqlite3.Connection:
    """Open a database: made where it is missing (mode 0600, its folder 0700), brought up to date if older.

    Every commit is on the disk when it returns (``synchronous=FULL``): what somebody was shown, such as a
    token, must not vanish with the power, and there are too few writes for the cost to matter.

    Raises:
        ConfigError: it is damaged, of a newer program, another program's, or may not be opened.
    """
    with _explained(path, schema):
        _make_file(path, schema)
        database = sqlite3.connect(path, timeout=BUSY_SECONDS)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("PRAGMA synchronous = FULL")
            if not _is_current(database, path, schema):
                # SQLite itself does not wait when two programs want to switch to WAL at the same time.
                lock = path.with_name(f"{path.name}.lock")
                make_file(lock)
                with exclusive(lock, wait=True):
                    _migrate(database, path, schema)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def opened(path: Path, schema: Schema) -> Iterator[sqlite3.Connection]:
    """A database for one piece of work, which is kept as a whole or not at all.

    Raises:
        ConfigError: as :func:`open_database`; also for damage that shows only now.
    """
    with closing(open_database(path, schema)) as database, _explained(path, schema), database:
        yield database


def check_database(path: Path, schema: Schema) -> None:
    """Read the whole database and look for damage; makes nothing where there is none.

    Raises:
        ConfigError: as :func:`open_database`.
    """
    if not path.exists():
        return
    with opened(path, schema) as database:
        (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise _damaged(path, schema, str(found))


def _make_file(path: Path, schema: Schema) -> None:
    try:
        # SQLite would make it readable to all; it gives its -wal and -shm files mode and owner of this one.
        make_file(path)
    except OSError as error:
        raise _not_opened(path, schema, str(error.strerror)) from error


def _is_current(database: sqlite3.Connection, path: Path, schema: Schema) -> bool:
    """Whether all migrations are in it and WAL is on; refuses what this program must not touch."""
    database.execute("BEGIN")  # one snapshot: another program may be making the tables right now
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    database.execute("COMMIT")
    if application == 0 and version == 0 and tables == 0:
        return False
    if application != schema.application_id:
        raise ConfigError(
            f"{path} is a database of another program (application id {application:#x}); "
            "move it away, or set EDGERT_HOME to another folder"
        )
    if version > len(schema.migrations):
        raise ConfigError(
            f"{path} was written by a newer edgert ({schema.name} version {version}, this one knows "
            f"{len(schema.migrations)}); install that version again, or set EDGERT_HOME to another folder"
        )
    (mode,) = database.execute("PRAGMA journal_mode").fetchone()
    return bool(version == len(schema.migrations) and mode == "wal")


def _migrate(database: sqlite3.Connection, path: Path, schema: Schema) -> None:
    if _is_current(database, path, schema):
        return  # another program did it while this one waited
    database.execute("PRAGMA journal_mode = WAL").fetchone()
    database.execute("BEGIN IMMEDIATE")
    with database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.execute(
                "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied REAL NOT NULL) STRICT"
            )
            database.execute(f"PRAGMA application_id = {schema.application_id}")
        for name, statements in schema.migrations[version:]:
            for statement in statements:
                database.execute(statement)
            database.execute("INSERT INTO migrations (name, applied) VALUES (?, ?)", (name, time.time()))
        database.execute(f"PRAGMA user_version = {len(schema.migrations)}")


@contextmanager
def _explained(path: Path, schema: Schema) -> Iterator[None]:
    """SQLite's errors as ours, apart from broken constraints, which are for the caller."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.OperationalError as error:
        if "disk image" in str(error) or "malformed" in str(error):
            raise _damaged(path, schema, str(error)) from error
        raise _not_opened(path, schema, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, schema, str(error)) from error


def _damaged(path: Path, schema: Schema, why: str) -> ConfigError:
    return ConfigError(
        f"the {schema.name} database {path} is damaged ({' '.join(why.split())}); stop the daemon, move it "
        f"away together with {path.name}-wal and {path.name}-shm (or put back a copy of all three), and "
        f"{schema.remedy}"
    )


def _not_opened(path: Path, schema: Schema, why: str) -> ConfigError:
    return ConfigError(
        f"the {schema.name} database {path} cannot be used ({why}); it needs free space and a user who may "
        "read and write it and its folder; EDGERT_HOME chooses another one"
    )
