"""What the daemon and the command line both do with edits: check what is asked for, compute it, undo it.

Nothing here knows of event loops or wire formats. Whoever computes edits holds a lock in the home folder, so
that the daemon and a command do not compute the same edit, and so that an edit without such a holder is known
to have been left by a process that ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.model_store.files import exclusive
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.progress import Progress
from edge_runtime.personalize.store import AdapterStore

if TYPE_CHECKING:
    from edge_runtime.engine.engine import Engine
    from edge_runtime.personalize.editor import Editor
    from edge_runtime.personalize.records import Kind, Record, State
    from edge_runtime.personalize.statistics import EditStatistics

LOCK_NAME = "edits.lock"  # in the home folder
_MAX_QUERIES = 16
_MAX_STEPS = 10_000
_MAX_SECONDS = 1e6

Turn = Callable[[], AbstractContextManager[object]]


# --- what is asked for --------------------------------------------------------------------------


def edit_request(
    prompt: str,
    subject: str,
    target: str,
    paraphrases: Sequence[str] = (),
    *,
    force: bool = False,
    steps: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """A fact to be edited, as the store keeps it.

    Raises:
        RequestError: a text is empty or too long, a prompt does not name the subject, or a limit is out of
            range.
    """
    from edge_runtime.personalize.request import EditRequest

    asked = EditRequest(prompt, subject, target, tuple(paraphrases))
    return {
        "prompt": asked.prompt,
        "subject": asked.subject,
        "target": asked.target,
        "paraphrases": list(asked.paraphrases),
        **_limits(force, steps, seconds),
    }


def forget_request(
    queries: Sequence[tuple[str, str]],
    refusal: str | None = None,
    *,
    force: bool = False,
    steps: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Queries to be refused, as the store keeps them.

    Args:
        queries: prompt and subject of each.
        refusal: what to say instead; None lets the model word it.

    Raises:
        RequestError: there is none or there are too many, a text is empty or too long, a prompt does not name
            its subject, or a limit is out of range.
    """
    from edge_runtime.personalize.request import EditRequest

    if not 1 <= len(queries) <= _MAX_QUERIES:
        raise RequestError(f"{len(queries)} queries to forget; possible are 1 to {_MAX_QUERIES}")
    # A forgetting is an edit whose target is a refusal; so its texts must be what an edit's must be.
    asked = [EditRequest(prompt, subject, "-" if refusal is None else refusal) for prompt, subject in queries]
    return {
        "queries": [{"prompt": one.prompt, "subject": one.subject} for one in asked],
        "refusal": None if refusal is None else asked[0].target,
        **_limits(force, steps, seconds),
    }


def _limits(force: bool, steps: int | None, seconds: float | None) -> dict[str, Any]:
    if steps is not None and not 1 <= steps <= _MAX_STEPS:
        raise RequestError(f"steps = {steps}; possible are 1 to {_MAX_STEPS}")
    if seconds is not None and not 0 < seconds <= _MAX_SECONDS:
        raise RequestError(f"seconds = {seconds}; needed is a number above 0, at most {_MAX_SECONDS:.0f}")
    return {"force": force, "steps": steps, "seconds": seconds}


# --- who computes -------------------------------------------------------------------------------


@contextmanager
def computing(store: AdapterStore, *, wait: bool) -> Iterator[None]:
    """Be the one that computes edits of this home folder; those that another one left go back to the queue.

    Raises:
        BlockingIOError: another process computes, and ``wait`` is false.
    """
    with exclusive(store.path.with_name(LOCK_NAME), wait=wait):
        running: tuple[State, ...] = ("running",)
        for record in store.records(states=running):
            store.requeue(record.id)
        yield


class ModelEdits:
    """The edits of one model. Methods take long; call them on a thread that may.

    Args:
        engine: with the whole model.
        store: of this device.
        turn: held during each forward pass.
    """

    def __init__(self, engine: Engine, store: AdapterStore, turn: Turn = nullcontext) -> None:
        self._engine = engine
        self._store = store
        self._turn = turn

    def run(self, record: Record, progress: Callable[[Progress], None]) -> Record:
        """Compute an edit that is queued; what it comes to is in the store.

        Raises:
            EdgeRuntimeError: it cannot be made. Cancelled: `progress` or the turn raised it.
        """
        if model_identity(self._engine.gguf) != record.identity:
            raise RequestError(
                f"{record.name} was asked for when {record.model} was another file; ask for it again"
            )
        return self._editor().run(record.id, progress)

    def revert(self, record: Record) -> Record:
        """Undo what is applied.

        Raises:
            RequestError: it is not applied.
        """
        if record.kind == "lora":
            self._store.revert(record.id, {})
            return self._store.get(str(record.id))
        return self._editor().revert(record.id)

    def reapply(self, record: Record) -> Record:
        """Apply what was rejected or undone.

        Raises:
            RequestError: it is neither, or one of the same subject was applied since.
        """
        if record.kind == "lora":
            changes = {record.id: self._store.changes(record.id)}
            self._store.finish(record.id, "applied", record.report, None, changes)
            return self._store.get(str(record.id))
        return self._editor().reapply(record.id)

    def evaluate(self, record: Record) -> Mapping[str, Any]:
        """The checks of an edit as it is now, in the form of a report.

        Raises:
            RequestError: it is no edit, or not applied.
        """
        check_testable(record)
        return {"checks": [check.facts() for check in self._editor().evaluate(record.id)]}

    def prepare(self, progress: Callable[[Progress], None]) -> EditStatistics:
        """Measure what edits need to know of the model, and keep it beside the model's file.

        Raises:
            UnsupportedModelError: the model writes no text that could tell.
            ConfigError: it cannot be kept.
        """
        from edge_runtime.personalize.preparing import prepare
        from edge_runtime.personalize.statistics import save_statistics
        from edge_runtime.personalize.workspace import Workspace

        with Workspace(self._engine, turn=self._turn) as workspace:
            found = prepare(self._engine, progress, workspace=workspace)
        try:
            save_statistics(found, self._engine.gguf)
        except OSError as error:
            raise ConfigError(
                f"what edits need to know lies beside the model, and {error.filename} cannot be written "
                f"({error.strerror}); `edgert models import` puts the model where it can"
            ) from error
        return found

    def _editor(self) -> Editor:
        from edge_runtime.personalize.editor import Editor
        from edge_runtime.personalize.statistics import load_statistics

        return Editor(self._engine, self._store, load_statistics(self._engine.gguf), turn=self._turn)


def identity_of_prepared(model: Path) -> str:
    """By what the store knows a model's file that can be edited.

    Raises:
        RequestError: nothing is known about it yet. ModelFileError: it is damaged.
    """
    from edge_runtime.engine.gguf import GGUFFile
    from edge_runtime.personalize.statistics import load_statistics

    with GGUFFile(model) as gguf:
        load_statistics(gguf)
        return model_identity(gguf)


def check_applied(record: Record, wish: str) -> None:
    """Whether something is in force.

    Raises:
        RequestError: it is not.
    """
    if record.state != "applied":
        raise RequestError(f"{record.name} is {record.state}; only what is applied can be {wish}")


def check_may_return(record: Record) -> None:
    """Whether something can be applied again.

    Raises:
        RequestError: it cannot.
    """
    if record.state not in ("rejected", "reverted"):
        raise RequestError(
            f"{record.name} is {record.state}; only what was rejected or undone can be applied again"
        )


def check_testable(record: Record) -> None:
    """Whether something can be tested.

    Raises:
        RequestError: it is no edit, or not applied.
    """
    if record.kind == "lora":
        raise RequestError(f"{record.name} is an adapter that was imported; only edits have checks")
    check_applied(record, "tested")


def queue_edit(
    store: AdapterStore, identity: str, model: str, request: Mapping[str, Any], name: str | None
) -> Record:
    """Ask for an edit; whether it is a fact or a forgetting shows in the request.

    Raises:
        RequestError: the name is in use or cannot be one.
    """
    kind: Kind = "forget" if "queries" in request else "edit"
    return store.add(kind, model, identity, request, name)
