"""The adapters and edits of this device: one SQLite database, shared by the daemon and the command line.

An edit's way: it is queued, runs, and is then applied, or rejected by its own checks, or failed; what is
applied can be reverted. Each change of the database is one transaction: a process that is killed leaves an
edit whole or absent, and the changes of edits that were solved together change together.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_runtime.database import check_database, opened
from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import RequestError
from edge_runtime.personalize import store_rows as rows
from edge_runtime.personalize.records import KINDS, REMOVABLE, Applied, Kind, Record, Solution, State
from edge_runtime.personalize.stored_arrays import MAX_BYTES

__all__ = ["STORE_NAME", "AdapterStore", "Applied", "Kind", "Record", "Solution", "State"]

STORE_NAME = "adapters.db"  # in the home folder
_MAX_ERROR = 4096  # characters


class AdapterStore:
    """Adapters and edits at rest, for several threads and processes at the same time.

    Each call opens the database for itself, and no transaction outlives one; reading makes no database.
    Every method raises ConfigError where the database is damaged, cannot be used or is another program's.

    Args:
        path: the database, ``<home>/adapters.db``; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- reading ------------------------------------------------------------------------------

    def get(self, reference: str) -> Record:
        """The record of a name or a number.

        Raises:
            AdapterNotFoundError: there is none; says which there are.
        """
        with self._reading() as database:
            return rows.find_record(database, reference)

    def records(self, identity: str | None = None, states: Collection[State] | None = None) -> list[Record]:
        """Every record, oldest first.

        Args:
            identity: only those of this model.
            states: only those in one of these.
        """
        with self._reading() as database:
            return [] if database is None else rows.select_records(database, identity, states)

    def changes(self, record_id: int) -> tuple[LowRank, ...]:
        """A record's low-rank changes, applied or not; none as long as it was not solved.

        Raises:
            AdapterNotFoundError: no such record.
        """
        with self._reading_of(record_id) as database:
            return rows.read_changes(database, record_id)

    def solution(self, record_id: int) -> Solution | None:
        """What a joint solution needs of a record; None where it has none.

        Raises:
            AdapterNotFoundError: no such record.
        """
        with self._reading_of(record_id) as database:
            return rows.read_solution(database, record_id)

    def progress(self, record_id: int) -> bytes | None:
        """What `keep_progress` kept last; None where there is nothing.

        Raises:
            AdapterNotFoundError: no such record.
        """
        with self._reading_of(record_id) as database:
            query = "SELECT content FROM progress WHERE record = ?"
            row = database.execute(query, (record_id,)).fetchone()
            return None if row is None else bytes(row[0])

    def applied(self, identity: str, *, solutions: bool = False) -> Applied:
        """What is applied to a model, all of one moment.

        Args:
            solutions: read those too.
        """
        with self._reading() as database:
            if database is None:
                return Applied(0, (), {}, {})
            standing: tuple[State, ...] = ("applied",)
            records = tuple(rows.select_records(database, identity, standing))
            changes = {record.name: rows.read_changes(database, record.id) for record in records}
            solved = {}
            for record in records if solutions else ():
                if (found := rows.read_solution(database, record.id)) is not None:
                    solved[record.id] = found
            return Applied(rows.read_revision(database), records, changes, solved)

    def revision(self) -> int:
        """A number that grows with each change of what is applied, to whichever model."""
        with self._reading() as database:
            return 0 if database is None else rows.read_revision(database)

    def check(self) -> None:
        """Read everything and look for damage; makes nothing where there is no database."""
        check_database(self.path, rows.SCHEMA)
        with self._reading() as database:
            if database is None:
                return
            for record in rows.select_records(database, None, None):
                rows.read_changes(database, record.id)
                rows.read_solution(database, record.id)

    # --- writing ------------------------------------------------------------------------------

    def add(
        self, kind: Kind, model: str, identity: str, request: Mapping[str, Any], name: str | None = None
    ) -> Record:
        """Queue an edit.

        Args:
            model: its name in the store, for people.
            identity: of the model's file, as `model_store.identity.model_identity` gives it.
            request: what JSON can hold.
            name: unique; without it the kind and the number, such as ``edit-7``.

        Raises:
            RequestError: a name that is in use or cannot be one, or a request that is no JSON.
        """
        if kind not in KINDS:
            raise RequestError(f"{kind!r} is no kind of adapter; needed is one of {', '.join(KINDS)}")
        with self._writing() as database:
            return rows.insert_record(database, kind, "queued", model, identity, request, name)

    def import_adapter(
        self, name: str, model: str, identity: str, changes: Sequence[LowRank], origin: Mapping[str, Any]
    ) -> Record:
        """Keep an adapter that was made elsewhere, and apply it.

        Args:
            changes: at least one; whether they fit the model is for the caller to see to.
            origin: where it came from, as JSON can hold it; becomes the record's request.

        Raises:
            RequestError: a name that is in use or cannot be one, or changes that are none.
        """
        with self._writing() as database:
            record = rows.insert_record(database, "lora", "applied", model, identity, origin, name)
            rows.keep_changes(database, record.id, changes)
            rows.advance_revision(database)
            return record

    def begin(self, record_id: int) -> None:
        """Take an edit from the queue: queued -> running. Of several callers, one succeeds.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is not queued.
        """
        with self._writing() as database:
            rows.move(database, record_id, "running")

    def requeue(self, record_id: int) -> None:
        """Put back an edit whose process ended: running -> queued; its progress is kept.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is not running.
        """
        with self._writing() as database:
            rows.move(database, record_id, "queued")

    def keep_progress(self, record_id: int, step: int, content: bytes) -> None:
        """Keep what a running edit needs to go on after a restart, instead of what was kept before.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is not running (any more), or the content is too large.
        """
        if len(content) > MAX_BYTES:
            raise RequestError(f"{len(content)} bytes of progress are too many; at most {MAX_BYTES} are kept")
        with self._writing() as database:
            record = rows.get_record(database, record_id)
            if record.state != "running":
                raise RequestError(f"{record.name} is {record.state}; only a running edit makes progress")
            database.execute("DELETE FROM progress WHERE record = ?", (record_id,))
            rows.insert(database, "progress", "record, step, content", (record_id, step, content))

    def finish(
        self,
        record_id: int,
        state: State,
        report: Mapping[str, Any],
        solution: Solution | None,
        solved: Mapping[int, Sequence[LowRank]],
        revision: int | None = None,
    ) -> bool:
        """End an edit: running -> applied or rejected; or apply what was rejected or reverted.

        Args:
            report: replaces the one there was.
            solution: what later joint solutions need of it; None leaves none.
            solved: id -> changes, of this record and of each standing one that was solved anew with it.
                Of a rejected one its own may be given: they are kept, for forcing it or looking at it.
            revision: that of what `solved` was computed from; None does not ask.

        Returns:
            whether it was kept. If not, nothing was written, because what is applied changed after
            `revision`: solve again.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is in another state, `solved` lacks it or names one that does not stand, or
                numbers are not finite.
        """
        if state not in ("applied", "rejected"):
            raise RequestError(f"an edit ends as applied or rejected, not as {state!r}")
        others = solved.keys() - {record_id}
        with self._writing() as database:
            if revision is not None and rows.read_revision(database) != revision:
                return False
            record = rows.move(database, record_id, state)
            if state == "applied" and record_id not in solved:
                raise RequestError(f"{record.name} cannot be applied without changes of its own")
            if state == "rejected" and others:
                raise RequestError(f"{record.name} is rejected and must not change other records")
            rows.check_standing(database, record, others)
            database.execute(
                "UPDATE records SET report = ? WHERE id = ?", (rows.json_text("report", report), record_id)
            )
            rows.keep_solution(database, record_id, solution)
            for number, changes in solved.items():
                rows.keep_changes(database, number, changes)
            rows.drop_progress(database, record_id)
            if state == "applied":
                rows.advance_revision(database)
            return True

    def revert(
        self, record_id: int, solved: Mapping[int, Sequence[LowRank]], revision: int | None = None
    ) -> bool:
        """Undo what is applied: applied -> reverted. Its own changes stay, for people to look at.

        Args:
            solved: id -> changes, of each standing record that was solved anew without this one.
            revision, and what is returned: as of `finish`.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is not applied, `solved` names one that does not stand, or numbers are not
                finite.
        """
        with self._writing() as database:
            if revision is not None and rows.read_revision(database) != revision:
                return False
            record = rows.move(database, record_id, "reverted")
            rows.check_standing(database, record, solved.keys())
            for number, changes in solved.items():
                rows.keep_changes(database, number, changes)
            rows.advance_revision(database)
            return True

    def fail(self, record_id: int, error: str) -> None:
        """End an edit that could not be computed: queued or running -> failed.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is in another state.
        """
        with self._writing() as database:
            rows.move(database, record_id, "failed")
            database.execute("UPDATE records SET error = ? WHERE id = ?", (error[:_MAX_ERROR], record_id))
            rows.drop_progress(database, record_id)

    def remove(self, record_id: int) -> None:
        """Delete a record with all that belongs to it; what it said is overwritten in the file.

        Raises:
            AdapterNotFoundError: no such record.
            RequestError: it is running or applied.
        """
        with self._writing(erase=True) as database:
            record = rows.get_record(database, record_id)
            if record.state not in REMOVABLE:
                remedy = "revert it first" if record.state == "applied" else "wait until it has ended"
                raise RequestError(f"{record.name} is {record.state} and cannot be removed; {remedy}")
            database.execute("DELETE FROM records WHERE id = ?", (record_id,))

    # --- one transaction ----------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The database as it is at one moment; None where there is none yet."""
        if not self.path.exists():
            yield None
            return
        with opened(self.path, rows.SCHEMA) as database:
            database.execute("BEGIN")
            yield database

    @contextmanager
    def _reading_of(self, record_id: int) -> Iterator[sqlite3.Connection]:
        """The database as it is at one moment, with that record in it."""
        with self._reading() as database:
            if database is None:
                raise rows.unknown(None, str(record_id))
            rows.get_record(database, record_id)
            yield database

    @contextmanager
    def _writing(self, *, erase: bool = False) -> Iterator[sqlite3.Connection]:
        """The database for one transaction; nobody else changes it until that ends."""
        with opened(self.path, rows.SCHEMA) as database:
            if erase:
                database.execute("PRAGMA secure_delete = ON")
            database.execute("BEGIN IMMEDIATE")
            yield database
