"""Edits that this process computes: on a thread, so that Ctrl-C ends them between two steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from edge_runtime.errors import EdgeRuntimeError, RequestError
from edge_runtime.personalize.edit_report import (
    Edit,
    EditProgress,
    EditState,
    edit_of,
    progress_of,
)
from edge_runtime.personalize.progress import Cancelled

if TYPE_CHECKING:
    from edge_runtime.daemon.editing import ModelEdits
    from edge_runtime.engine.engine import Engine
    from edge_runtime.personalize.progress import Progress
    from edge_runtime.personalize.records import Record
    from edge_runtime.personalize.store import AdapterStore

_QUEUED: tuple[EditState, ...] = ("queued",)
_LOOK_SECONDS = 0.2  # how often a command looks whether another one has ended

Told = TypeVar("Told")
Value = TypeVar("Value")


class Background(Generic[Told, Value]):
    """A function on a thread; iterating gives what it tells, and raises what it raises.

    Args:
        function: called with what takes its reports, which raises Cancelled once nobody listens.
    """

    def __init__(self, function: Callable[[Callable[[Told], None]], Value]) -> None:
        self._function = function
        self._told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._value: list[Value] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="edit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._function(self.tell))
        except BaseException as error:
            self._error = error
        self._told.put(None)

    def tell(self, moment: Told) -> None:
        """Report something; on the thread.

        Raises:
            Cancelled: nobody listens any more.
        """
        if self._closed.is_set():
            raise Cancelled
        self._told.put(moment)

    def __iter__(self) -> Iterator[Told]:
        while (moment := self._told.get()) is not None:
            yield moment
        self.outcome()

    def outcome(self) -> Value:
        """What it returned; waits for that."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]

    def close(self) -> None:
        """End it at its next report, and wait for that."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Background[Told, Value]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class LocalStream:
    """An edit that this process computes, as the client's stream shows one of the daemon. `close` cancels it.

    Edits of the same model that an earlier process left come first.

    Args:
        loaded: frees the engine when it is left.
        model: what the store calls the model.
        request: as the store keeps it.
        name: what to call the edit; None for a free name.

    Attributes:
        edit: as it was last known; None until it is queued.
    """

    def __init__(
        self,
        store: AdapterStore,
        loaded: AbstractContextManager[object],
        editing: tuple[Engine, ModelEdits],
        model: str,
        request: Mapping[str, Any],
        name: str | None,
    ) -> None:
        self._store = store
        self._loaded = loaded
        self._engine, self._edits = editing
        self._model = model
        self._request = request
        self._name = name
        self.edit: Edit | None = None
        self._background: Background[EditProgress, Record] = Background(self._make)

    def __iter__(self) -> Iterator[EditProgress]:
        yield from self._background
        self.edit = edit_of(self._background.outcome())

    def close(self) -> None:
        """End it, and free the model."""
        try:
            self._background.close()
        finally:
            self._loaded.__exit__(None, None, None)

    # --- on the thread ------------------------------------------------------------------------

    def _make(self, tell: Callable[[EditProgress], None]) -> Record:
        from edge_runtime.daemon.editing import queue_edit
        from edge_runtime.model_store.identity import model_identity

        lock = self._lock(tell)
        try:
            identity = model_identity(self._engine.gguf)
            record = queue_edit(self._store, identity, self._model, self._request, self._name)
            self.edit = edit_of(record)
            for other in self._store.records(record.identity, _QUEUED):
                if other.id < record.id:
                    self._finish_other(other, tell)
            return self._finish(record, tell)
        except (Cancelled, EdgeRuntimeError) as error:
            if self.edit is not None:
                why = str(error) if isinstance(error, EdgeRuntimeError) else "interrupted"
                with suppress(RequestError):  # it has ended
                    self._store.fail(self.edit.id, why)
            raise
        finally:
            lock.__exit__(None, None, None)

    def _lock(self, tell: Callable[[EditProgress], None]) -> AbstractContextManager[None]:
        """Be the one process that computes edits."""
        from edge_runtime.daemon.editing import computing

        pause = threading.Event()
        while True:
            lock = computing(self._store, wait=False)
            try:
                lock.__enter__()
                return lock
            except BlockingIOError:
                unfinished = self._store.records(states=("queued", "running"))
                tell(EditProgress("waiting", tuple(one.name for one in unfinished) or ("another command",)))
                pause.wait(_LOOK_SECONDS)

    def _finish_other(self, record: Record, tell: Callable[[EditProgress], None]) -> None:
        """Go on with an edit that an earlier process left."""
        waiting = EditProgress("waiting", (record.name,))
        try:
            self._edits.run(record, lambda _: tell(waiting))
        except EdgeRuntimeError as error:
            with suppress(RequestError):
                self._store.fail(record.id, str(error))
        except Cancelled:
            self._store.requeue(record.id)
            raise

    def _finish(self, record: Record, tell: Callable[[EditProgress], None]) -> Record:
        def progress(moment: Progress) -> None:
            tell(progress_of(moment))

        return self._edits.run(record, progress)
