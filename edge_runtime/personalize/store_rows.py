"""The tables of the adapter store, and what is read and written inside one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edge_runtime.database import Schema
from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import AdapterNotFoundError, RequestError
from edge_runtime.personalize.records import (
    KINDS,
    MAY_BECOME,
    REMOVABLE,
    STATES,
    Kind,
    Record,
    Solution,
    State,
    check_model,
    check_name,
)
from edge_runtime.personalize.stored_arrays import (
    CHANGE_COLUMNS,
    SOLUTION_COLUMNS,
    change_of,
    change_row,
    solution_of,
    solution_row,
)

_MAX_JSON = 1 << 22  # characters of a request or a report
_MAX_NAMED = 20  # records named in one message

_COLUMNS = "id, name, model, identity, kind, state, created, changed, request, report, error"

SCHEMA = Schema(
    "adapter",
    0x45444741,  # "EDGA": how the file says whose it is
    (
        (
            "adapters",
            (
                """
                CREATE TABLE records (
                    id INTEGER PRIMARY KEY AUTOINCREMENT,
                    name TEXT NOT NULL UNIQUE COLLATE NOCASE,
                    model TEXT NOT NULL,
                    identity TEXT NOT NULL,
                    kind TEXT NOT NULL,
                    state TEXT NOT NULL,
                    created REAL NOT NULL,
                    changed REAL NOT NULL,
                    request TEXT NOT NULL,
                    report TEXT NOT NULL DEFAULT '{}',
                    error TEXT NOT NULL DEFAULT ''
                ) STRICT
                """,
                """
                CREATE TABLE changes (
                    record INTEGER NOT NULL REFERENCES records (id) ON DELETE CASCADE,
                    position INTEGER NOT NULL,
                    matrix TEXT NOT NULL,
                    rank INTEGER NOT NULL,
                    n_in INTEGER NOT NULL,
                    n_out INTEGER NOT NULL,
                    scale REAL NOT NULL,
                    a BLOB NOT NULL,
                    b BLOB NOT NULL,
                    checksum INTEGER NOT NULL,
                    PRIMARY KEY (record, position)
                ) STRICT
                """,
                """
                CREATE TABLE solutions (
                    record INTEGER PRIMARY KEY REFERENCES records (id) ON DELETE CASCADE,
                    layer INTEGER NOT NULL,
                    n_keys INTEGER NOT NULL,
                    n_ff INTEGER NOT NULL,
                    n_parts INTEGER NOT NULL,
                    n_embd INTEGER NOT NULL,
                    keys BLOB NOT NULL,
                    parts BLOB NOT NULL,
                    deltas BLOB NOT NULL,
                    checksum INTEGER NOT NULL
                ) STRICT
                """,
                """
                CREATE TABLE progress (
                    record INTEGER PRIMARY KEY REFERENCES records (id) ON DELETE CASCADE,
                    step INTEGER NOT NULL,
                    content BLOB NOT NULL
                ) STRICT
                """,
                """
                CREATE TABLE revision (
                    only INTEGER PRIMARY KEY CHECK (only = 1),
                    number INTEGER NOT NULL
                ) STRICT
                """,
                "INSERT INTO revision VALUES (1, 0)",
            ),
        ),
    ),
    "make the edits anew with `edgert edit`",
)


# --- records ----------------------------------------------------------------------------------


def insert_record(
    database: sqlite3.Connection,
    kind: Kind,
    state: State,
    model: str,
    identity: str,
    request: Mapping[str, Any],
    name: str | None,
) -> Record:
    """Add a record; without a name, the kind and the number name it.

    Raises:
        RequestError: a name that is in use or cannot be one, or a request that is no JSON.
    """
    check_model(model, identity)
    row = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    number = 1 if row is None else int(row[0]) + 1
    if name is None:
        name = f"{kind}-{number}"
        while _name_in_use(database, name):  # somebody chose it
            name += "a"
    check_name(name)
    if (used := _name_in_use(database, name)) is not None:
        raise RequestError(f"there is {used!r} already (capital letters do not count); choose another name")
    now = time.time()
    values = (number, name, model, identity, kind, state, now, now, json_text("request", request))
    columns = "id, name, model, identity, kind, state, created, changed, request"
    insert(database, "records", columns, values)
    return get_record(database, number)


def _name_in_use(database: sqlite3.Connection, name: str) -> str | None:
    row = database.execute("SELECT name FROM records WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def get_record(database: sqlite3.Connection | None, number: int) -> Record:
    """The record of a number; `database` is None where there is none yet.

    Raises:
        AdapterNotFoundError: there is none.
    """
    found = None if database is None else _find(database, "id = ?", number)
    if found is None:
        raise unknown(database, str(number))
    return found


def find_record(database: sqlite3.Connection | None, reference: str) -> Record:
    """The record of a name or a number in decimal digits; names start with a letter.

    Raises:
        AdapterNotFoundError: there is none.
    """
    found = None
    if database is not None:
        if reference.isascii() and reference.isdigit() and len(reference) <= 18:  # fits 64 bits
            found = _find(database, "id = ?", int(reference))
        else:
            found = _find(database, "name = ? COLLATE BINARY", reference)
    if found is None:
        raise unknown(database, reference)
    return found


def _find(database: sqlite3.Connection, where: str, value: int | str) -> Record | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM records WHERE {where}", (value,)).fetchone()
    return None if row is None else _record(row)


def unknown(database: sqlite3.Connection | None, reference: str) -> AdapterNotFoundError:
    """The error for a record that is not there; it says which there are, the latest first."""
    names = []
    if database is not None:
        query = "SELECT name FROM records ORDER BY id DESC LIMIT ?"
        names = [name for (name,) in database.execute(query, (_MAX_NAMED + 1,))]
    if not names:
        return AdapterNotFoundError(
            f"there is no adapter {reference[:80]!r}, nor any other; `edgert edit` makes one"
        )
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return AdapterNotFoundError(
        f"there is no adapter {reference[:80]!r}; there are {', '.join(names[:_MAX_NAMED])}{more}"
    )


def select_records(
    database: sqlite3.Connection, identity: str | None, states: Collection[State] | None
) -> list[Record]:
    """Records, oldest first; None chooses all models, or all states."""
    rows = database.execute(f"SELECT {_COLUMNS} FROM records ORDER BY id").fetchall()
    records = map(_record, rows)
    return [
        record
        for record in records
        if (identity is None or record.identity == identity) and (states is None or record.state in states)
    ]


def _record(row: tuple[Any, ...]) -> Record:
    number, name, model, identity, kind, state, created, changed, request, report, error = row
    if kind not in KINDS or state not in STATES:
        raise sqlite3.DatabaseError(f"{name!r} is a {kind!r} in the state {state!r}")
    asked, came = _json_object(name, request), _json_object(name, report)
    return Record(number, name, model, identity, kind, state, created, changed, asked, came, error)


def move(database: sqlite3.Connection, number: int, state: State) -> Record:
    """Bring a record into another state; returns it as it was.

    Raises:
        AdapterNotFoundError: no such record.
        RequestError: there is no way from its state to that one.
    """
    record = get_record(database, number)
    if state not in MAY_BECOME[record.state]:
        possible = [f"become {each}" for each in MAY_BECOME[record.state]]
        possible += ["be removed"] if record.state in REMOVABLE else []
        raise RequestError(
            f"{record.name} is {record.state} and cannot become {state}; it can {' or '.join(possible)}"
        )
    database.execute("UPDATE records SET state = ?, changed = ? WHERE id = ?", (state, time.time(), number))
    return record


def check_standing(database: sqlite3.Connection, record: Record, others: Collection[int]) -> None:
    """Refuse changes of records that are not applied to the same model as `record`.

    Raises:
        AdapterNotFoundError: no such record.
        RequestError: one is of another model, not applied, or `record` itself.
    """
    for number in others:
        other = get_record(database, number)
        if number == record.id or other.state != "applied" or other.identity != record.identity:
            raise RequestError(
                f"{other.name} ({other.state}, of {other.model}) does not stand beside {record.name}; "
                "read what is applied and solve again"
            )


# --- what belongs to a record -----------------------------------------------------------------


def keep_changes(database: sqlite3.Connection, number: int, changes: Sequence[LowRank]) -> None:
    """Replace a record's changes.

    Raises:
        RequestError: there are none, or they are no low-rank changes.
    """
    if not changes:
        raise RequestError("an adapter needs at least one low-rank change of a matrix")
    database.execute("DELETE FROM changes WHERE record = ?", (number,))
    for position, change in enumerate(changes):
        insert(
            database,
            "changes",
            f"record, position, {CHANGE_COLUMNS}",
            (number, position, *change_row(change)),
        )


def read_changes(database: sqlite3.Connection, number: int) -> tuple[LowRank, ...]:
    """A record's changes, in their order."""
    query = f"SELECT {CHANGE_COLUMNS} FROM changes WHERE record = ? ORDER BY position"
    return tuple(map(change_of, database.execute(query, (number,))))


def keep_solution(database: sqlite3.Connection, number: int, solution: Solution | None) -> None:
    """Replace a record's solution; None leaves none.

    Raises:
        RequestError: its arrays do not fit together.
    """
    database.execute("DELETE FROM solutions WHERE record = ?", (number,))
    if solution is not None:
        insert(database, "solutions", f"record, {SOLUTION_COLUMNS}", (number, *solution_row(solution)))


def read_solution(database: sqlite3.Connection, number: int) -> Solution | None:
    """A record's solution; None where it has none."""
    query = f"SELECT {SOLUTION_COLUMNS} FROM solutions WHERE record = ?"
    row = database.execute(query, (number,)).fetchone()
    return None if row is None else solution_of(row)


def drop_progress(database: sqlite3.Connection, number: int) -> None:
    """Forget how far an edit had come."""
    database.execute("DELETE FROM progress WHERE record = ?", (number,))


def read_revision(database: sqlite3.Connection) -> int:
    """How often what is applied has changed."""
    (number,) = database.execute("SELECT number FROM revision").fetchone()
    return int(number)


def advance_revision(database: sqlite3.Connection) -> None:
    """Say that what is applied has changed."""
    database.execute("UPDATE revision SET number = number + 1")


def insert(database: sqlite3.Connection, table: str, columns: str, values: Sequence[object]) -> None:
    """Add a row."""
    places = ", ".join("?" * len(values))
    database.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", values)


def json_text(what: str, content: Mapping[str, Any]) -> str:
    """A request or a report as it is stored.

    Raises:
        RequestError: JSON cannot hold it, or it is too long.
    """
    try:
        text = json.dumps(dict(content), allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: a half surrogate, or no number
        raise RequestError(f"the {what} cannot be kept as JSON ({type(error).__name__})") from error
    if len(text) > _MAX_JSON:
        raise RequestError(f"the {what} has {len(text)} characters; at most {_MAX_JSON} are kept")
    return text


def _json_object(name: str, text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"what is kept of {name!r} is no JSON") from error
    if not isinstance(found, dict):
        raise sqlite3.DatabaseError(f"what is kept of {name!r} is no JSON object")
    return found
