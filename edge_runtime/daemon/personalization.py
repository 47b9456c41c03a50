"""The edits of a daemon: what is asked for them, the queue, and those who watch.

An edit is a job, not a call: it goes on when whoever asked for it goes away, and after a restart. While it is
computed, answers have most of the time (:mod:`edge_runtime.daemon.edit_turns`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.daemon import editing
from edge_runtime.daemon.adapter_exchange import AdapterFormat, check_one_model, read_adapter, write_adapters
from edge_runtime.daemon.edit_thread import EditThread
from edge_runtime.daemon.edit_turns import EditTurns
from edge_runtime.errors import EdgeRuntimeError, OverloadedError, RequestError, UnavailableError
from edge_runtime.personalize.progress import Cancelled, Progress
from edge_runtime.personalize.store import AdapterStore

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service
    from edge_runtime.personalize.records import Record, State

_log = logging.getLogger("edgert.edits")

_MOST_QUEUED = 64
_MOST_ERRORS = 64
_LOOK_SECONDS = 1.0  # how often the store is read for what another process has changed
_RETRY_SECONDS = 5.0  # after which an edit whose model could not be loaded is tried again
_REPORT_SECONDS = 0.25  # between two reports of a preparation
_UNFINISHED: tuple[State, ...] = ("queued", "running")
_QUEUED: tuple[State, ...] = ("queued",)
_APPLIED: tuple[State, ...] = ("applied",)


@dataclass(frozen=True, slots=True)
class EditEvent:
    """How far an edit is.

    Attributes:
        record: as it is in the store.
        behind: names of those that are computed before it.
        progress: what the computation said last; None while it waits.
    """

    record: Record
    behind: tuple[str, ...] = ()
    progress: Progress | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """The edit that is being computed."""

    record: Record
    turns: EditTurns | None = None
    cancelled: bool = False
    progress: Progress | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Let the computation end where somebody wants that; from any thread."""
        if self.cancelled or (self.turns is not None and self.turns.stopped):
            raise Cancelled


class Personalization:
    """What the APIs ask of edits. Methods are called on the event loop.

    Args:
        service: whose models are edited.
    """

    def __init__(self, service: Service) -> None:
        self.store = AdapterStore(service.adapters.path)
        self._service = service
        self._thread = EditThread(service, self.store)
        self._queued = asyncio.Event()
        self._watchers: set[asyncio.Event] = set()
        self._errors: dict[int, EdgeRuntimeError] = {}  # why edits of this process failed, for who watches
        self._job: _Job | None = None
        self._runner: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Go on with what was left when the daemon ended."""
        self._runner = asyncio.create_task(self._run())
        self._queued.set()

    async def stop(self) -> None:
        """Interrupt what is being computed; the next start goes on with it."""
        self._stopping = True
        self._tell()
        await self._thread.stop()
        if self._job is not None:
            await self._job.ended.wait()
        if self._runner is not None:
            self._runner.cancel()
            with suppress(asyncio.CancelledError):
                await self._runner

    # --- asking -------------------------------------------------------------------------------

    async def submit(self, model: str, request: Mapping[str, Any], name: str | None = None) -> Record:
        """Queue an edit.

        Args:
            model: name in the store; empty for the default one.
            request: of :func:`editing.edit_request` or :func:`editing.forget_request`.
            name: what to call it; None for a name that is free.

        Raises:
            RequestError: the name cannot be used, or nothing is known about the model yet.
            ModelNotFoundError, ModelFileError: of the model. OverloadedError: too many wait.
            UnavailableError: the daemon is stopping.
        """
        waiting = await asyncio.to_thread(self.store.records, states=_QUEUED)
        if len(waiting) >= _MOST_QUEUED:
            raise OverloadedError(f"{len(waiting)} edits wait already; try again when some have ended", 60.0)
        model = model or self._service.default_model
        identity = await asyncio.to_thread(editing.identity_of_prepared, self._service.model_path(model))
        if self._stopping:
            raise UnavailableError("the daemon is stopping; ask again later")
        record = await asyncio.to_thread(
            editing.queue_edit, self.store, identity, self._kept_name(model), request, name
        )
        _log.info("edit queued", extra={"edit": record.name, "model": model})
        self._queued.set()
        self._tell()
        return record

    async def get(self, reference: str) -> Record:
        """The record of a name or a number.

        Raises:
            AdapterNotFoundError: there is none.
        """
        return await asyncio.to_thread(self.store.get, reference)

    async def events(self, model: str = "") -> list[EditEvent]:
        """Every edit and adapter, oldest first.

        Args:
            model: only those of this one.
        """
        records = await asyncio.to_thread(self.store.records)
        return [self._event(one, records) for one in records if not model or one.model == model]

    async def cancel(self, reference: str) -> Record:
        """End an edit that waits or runs.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it has ended, or another process computes it.
        """
        record = await self.get(reference)
        job = self._job
        if job is not None and job.record.id == record.id:
            job.cancelled = True
            if job.turns is not None:
                job.turns.stop()
            await job.ended.wait()
        elif record.state == "running":
            raise RequestError(f"{record.name} is computed by another process; end that one")
        elif record.state == "queued":
            await asyncio.to_thread(self.store.fail, record.id, "cancelled before it began")
            self._tell()
        else:
            raise RequestError(f"{record.name} is {record.state}; only what waits or runs can be cancelled")
        return await self.get(str(record.id))

    async def revert(self, reference: str) -> Record:
        """Undo what is applied, and answer without it from the next answer on.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it is not applied.
        """
        record = await self.get(reference)
        editing.check_applied(record, "undone")
        if record.kind == "lora":
            await asyncio.to_thread(self.store.revert, record.id, {})
        else:
            await self._compute(self._model_of(record), lambda edits: edits.revert(record), beside=True)
        await self._service.refresh_adapters()
        self._tell()
        _log.info("edit reverted", extra={"edit": record.name, "model": record.model})
        return await self.get(str(record.id))

    async def reapply(self, reference: str) -> Record:
        """Apply what was rejected or undone, and answer with it from the next answer on.

        Raises:
            AdapterNotFoundError: there is none.
            RequestError: it is neither, or one of the same subject was applied since.
        """
        record = await self.get(reference)
        editing.check_may_return(record)
        await self._compute(self._model_of(record), lambda edits: edits.reapply(record), beside=True)
        await self._service.refresh_adapters()
        self._tell()
        _log.info("edit applied again", extra={"edit": record.name, "model": record.model})
        return await self.get(str(record.id))

    async def remove(self, reference: str) -> Record:
        """Delete what is not in force, and what it was asked for.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it runs or is applied.
        """
        record = await self.get(reference)
        await asyncio.to_thread(self.store.remove, record.id)
        self._tell()
        return record

    async def evaluate(
        self, references: Sequence[str], model: str
    ) -> AsyncIterator[tuple[Record, Mapping[str, Any]]]:
        """Test edits again, as they are now; without names all that are applied to a model.

        Raises:
            AdapterNotFoundError: there is none of a name. RequestError: one is no edit, or not applied.
        """
        model = model or self._service.default_model
        if references:
            records = [await self.get(reference) for reference in references]
        else:
            path = self._service.model_path(model)
            identity = await asyncio.to_thread(editing.identity_of_prepared, path)
            applied = await asyncio.to_thread(self.store.records, identity, _APPLIED)
            records = [record for record in applied if record.kind != "lora"]
        for record in records:
            editing.check_testable(record)
        for record in records:
            chosen = self._model_of(record) if references else model
            yield record, await self._compute(chosen, lambda edits, one=record: edits.evaluate(one))

    async def prepare(self, model: str) -> AsyncIterator[tuple[float, int | None]]:
        """Measure what edits need to know of a model. Leaving it stops it.

        Yields:
            the share that is done, and at the end 1 and the layer that edits will change.
        """
        share = 0.0

        def report(moment: Progress) -> None:
            nonlocal share
            share = moment.step / max(moment.steps, 1)

        task = asyncio.create_task(self._compute(model, lambda edits: edits.prepare(report)))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_REPORT_SECONDS)
                yield min(share, 0.999), None
            yield 1.0, task.result().layer
        finally:
            task.cancel()
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def export(self, references: Sequence[str], form: AdapterFormat, folder: Path) -> list[Path]:
        """Write edits or adapters of one model, added up, as files of one adapter; returns them.

        Raises:
            AdapterNotFoundError: there is none of a name. RequestError: they cannot be one adapter.
        """
        records = [await self.get(reference) for reference in references]
        check_one_model(records)
        model = self._service.model_path(self._model_of(records[0]))
        return await asyncio.to_thread(write_adapters, self.store, records, model, form, folder)

    async def take_in(self, name: str, model: str, form: AdapterFormat, folder: Path) -> Record:
        """Keep and apply the adapter whose files are in a folder.

        Raises:
            AdapterFileError: they are damaged or of another model. RequestError: the name cannot be used.
        """
        model = model or self._service.default_model
        path = self._service.model_path(model)
        kept = (self._kept_name(model), path)
        record = await asyncio.to_thread(read_adapter, self.store, name, kept, form, folder)
        await self._service.refresh_adapters()
        _log.info("adapter imported", extra={"edit": record.name, "model": model})
        return record

    def _kept_name(self, model: str) -> str:
        """What the store calls a model: as others find it too, so a file outside by its path."""
        known = any(one.name == model for one in self._service.store)
        return model if known else str(self._service.model_path(model).absolute())

    def _model_of(self, record: Record) -> str:
        """What the daemon calls the model of a record."""
        with suppress(EdgeRuntimeError):
            self._service.model_path(record.model)
            return record.model
        found = [one.name for one in self._service.workers() if one.identity == record.identity]
        default = self._service.default_model
        with suppress(EdgeRuntimeError):
            if str(self._service.model_path(default).absolute()) == record.model:
                found.append(default)
        return found[0] if found else record.model

    async def _compute(self, model: str, function: Any, *, beside: bool = False) -> Any:
        try:
            return await self._thread.compute(model, lambda edits, turns: function(edits), beside=beside)
        except Cancelled:
            raise UnavailableError("the model is being unloaded; ask again") from None

    # --- watching -----------------------------------------------------------------------------

    async def follow(self, reference: str) -> AsyncIterator[EditEvent]:
        """How far an edit is, until it has ended; leaving it does not end the edit.

        Raises:
            AdapterNotFoundError: there is none. EdgeRuntimeError: why it failed, while somebody watched.
            UnavailableError: the daemon stops; the edit goes on at its next start.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            number = (await self.get(reference)).id
            told: EditEvent | None = None
            while told is None or told.record.state in _UNFINISHED:
                changed.clear()
                record = await self.get(str(number))
                others = () if record.state != "queued" else await asyncio.to_thread(self.store.records)
                event = self._event(record, others)
                error = self._errors.get(number)
                if record.state == "failed" and error is not None:
                    raise error.with_traceback(None)
                if event != told:
                    yield event
                told = event
                if self._stopping and record.state in _UNFINISHED:
                    raise UnavailableError(
                        f"the daemon stops; {record.name} goes on when it is started again"
                    )
                if record.state in _UNFINISHED:
                    await self._wait_for(changed)
        finally:
            self._watchers.discard(changed)

    async def _wait_for(self, changed: asyncio.Event) -> None:
        with suppress(TimeoutError):  # another process may compute it, and tells nobody here
            async with asyncio.timeout(_LOOK_SECONDS):
                await changed.wait()

    def _event(self, record: Record, records: Sequence[Record]) -> EditEvent:
        if record.state == "queued":
            before = [one for one in records if one.state in _UNFINISHED and one.id < record.id]
            return EditEvent(record, tuple(one.name for one in before))
        job = self._job
        progress = job.progress if job is not None and job.record.id == record.id else None
        return EditEvent(record, (), progress if record.state == "running" else None)

    def _moment(self, job: _Job, moment: Progress) -> None:
        job.progress = moment
        self._tell()

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    # --- the queue ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            await self._queued.wait()
            self._queued.clear()
            try:
                while not self._stopping and await self._next():
                    pass
            except EdgeRuntimeError as error:
                _log.error("the queue of edits stands still: %s", error)

    async def _next(self) -> bool:
        """Compute the oldest edit that waits; whether there was one."""
        if not await asyncio.to_thread(self.store.records, states=_UNFINISHED):
            return False
        lock = editing.computing(self.store, wait=False)
        try:
            await asyncio.to_thread(lock.__enter__)
        except BlockingIOError:  # a command computes
            await asyncio.sleep(_LOOK_SECONDS)
            return True
        try:
            waiting = await asyncio.to_thread(self.store.records, states=_QUEUED)
            if waiting:
                await self._edit(waiting[0])
            return bool(waiting)
        finally:
            lock.__exit__(None, None, None)

    async def _edit(self, record: Record) -> None:
        """Compute one edit, whatever comes of it."""
        job = self._job = _Job(record)
        try:
            await self._attempt(job)
        except Cancelled:
            if job.cancelled:
                await self._fail(record, "cancelled")
            else:  # the daemon stops, or the model is unloaded: it goes on later
                with suppress(RequestError):
                    await asyncio.to_thread(self.store.requeue, record.id)
        except OverloadedError as error:
            _log.warning("%s waits: %s", record.name, error)
            await asyncio.sleep(_RETRY_SECONDS)
        except UnavailableError:
            _log.info("edit interrupted", extra={"edit": record.name})
        except EdgeRuntimeError as error:
            self._keep_error(record, error)
            await self._fail(record, str(error))
        except Exception:
            _log.exception("an edit failed", extra={"edit": record.name})
            await self._fail(record, "an internal error; the daemon's log says more")
        finally:
            self._job = None
            job.ended.set()
            self._tell()

    async def _attempt(self, job: _Job) -> None:
        record = job.record
        loop = asyncio.get_running_loop()

        def progress(moment: Progress) -> None:
            job.check()
            loop.call_soon_threadsafe(self._moment, job, moment)

        def run(edits: editing.ModelEdits, turns: EditTurns) -> Record:
            job.turns = turns
            job.check()
            return edits.run(record, progress)

        found = await self._thread.compute(self._model_of(record), run)
        _log.info("edit ended", extra={"edit": found.name, "state": found.state})
        if found.state == "applied":
            try:
                await self._service.refresh_adapters()
            except EdgeRuntimeError as error:
                _log.error("%s is applied, but the model does not answer with it: %s", found.name, error)

    async def _fail(self, record: Record, why: str) -> None:
        _log.info("edit failed", extra={"edit": record.name})
        with suppress(RequestError):  # it has ended already
            await asyncio.to_thread(self.store.fail, record.id, why)

    def _keep_error(self, record: Record, error: EdgeRuntimeError) -> None:
        self._errors[record.id] = error
        if len(self._errors) > _MOST_ERRORS:
            del self._errors[min(self._errors)]
