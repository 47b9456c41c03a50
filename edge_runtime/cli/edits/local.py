"""The edits of this device without a daemon: what its client offers, computed in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from edge_runtime.cli.edits.background import Background, LocalStream
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import RequestError
from edge_runtime.personalize.edit_report import Edit, EditState, checks_of, edit_of

if TYPE_CHECKING:
    from edge_runtime.client import EditEvaluation, PrepareProgress
    from edge_runtime.daemon.editing import ModelEdits
    from edge_runtime.engine.engine import Engine
    from edge_runtime.personalize.records import Record

_APPLIED: tuple[EditState, ...] = ("applied",)
_CONTEXT = 64  # tokens: nobody is answered


class LocalEdits:
    """Edits of this user's store. What computes loads the model first.

    Args:
        model: name in the store, or a file.
        threads, weights: of the engine.
    """

    def __init__(
        self, model: str, threads: int | None = None, weights: Literal["repack", "mmap"] = "repack"
    ) -> None:
        from edge_runtime.daemon.adapters import STORE_NAME
        from edge_runtime.model_store.paths import home
        from edge_runtime.personalize.store import AdapterStore

        self._model = model
        self._threads = threads
        self._weights: Literal["repack", "mmap"] = weights
        self._store = AdapterStore(home() / STORE_NAME)

    def __enter__(self) -> LocalEdits:
        return self

    def __exit__(self, *exception: object) -> None: ...

    # --- what needs no model ------------------------------------------------------------------

    def list(self, model: str = "") -> tuple[Edit, ...]:
        """Every edit and adapter, oldest first."""
        return tuple(edit_of(one) for one in self._store.records() if not model or one.model == model)

    def show(self, name: str) -> Edit:
        """One of them.

        Raises:
            AdapterNotFoundError: there is none of that name or number.
        """
        return edit_of(self._store.get(name))

    def remove(self, name: str) -> Edit:
        """Delete what is not in force; errors are those of the client."""
        record = self._store.get(name)
        self._store.remove(record.id)
        return edit_of(record)

    def cancel(self, name: str) -> Edit:
        """End an edit that waits.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it has ended, or a process computes it.
        """
        from edge_runtime.daemon.editing import computing

        record = self._store.get(name)
        if record.state not in ("queued", "running"):
            raise RequestError(f"{record.name} is {record.state}; only what waits or runs can be cancelled")
        try:
            with computing(self._store, wait=False):
                self._store.fail(record.id, "cancelled")
        except BlockingIOError:
            if record.state == "running":
                raise RequestError(
                    f"{record.name} is computed by another command; Ctrl-C ends that one"
                ) from None
            self._store.fail(record.id, "cancelled before it began")
        return self.show(str(record.id))

    # --- what computes ------------------------------------------------------------------------

    def apply(
        self, prompt: str, subject: str, target: str, *, paraphrases: Sequence[str] = (), **options: Any
    ) -> LocalStream:
        """Change a fact; arguments and errors are those of the client."""
        from edge_runtime.daemon.editing import edit_request

        name = options.pop("name", None)
        return self._start(edit_request(prompt, subject, target, paraphrases, **options), name)

    def forget(
        self, queries: Iterable[tuple[str, str]], *, refusal: str | None = None, **options: Any
    ) -> LocalStream:
        """Let the model refuse queries; arguments and errors are those of the client."""
        from edge_runtime.daemon.editing import forget_request

        name = options.pop("name", None)
        return self._start(forget_request(list(queries), refusal, **options), name)

    def revert(self, name: str) -> Edit:
        """Undo what is applied.

        Raises:
            AdapterNotFoundError: there is none. RequestError: it is not applied.
        """
        from edge_runtime.daemon.editing import check_applied

        record = self._store.get(name)
        check_applied(record, "undone")
        if record.kind == "lora":
            self._store.revert(record.id, {})
            return self.show(str(record.id))
        with self._edits_of(record.model) as (_, edits):
            return edit_of(edits.revert(record))

    def reapply(self, name: str) -> Edit:
        """Apply what was rejected or undone; errors are those of the client."""
        from edge_runtime.daemon.editing import check_may_return

        record = self._store.get(name)
        check_may_return(record)
        with self._edits_of(record.model) as (_, edits):
            return edit_of(edits.reapply(record))

    def evaluate(self, names: Sequence[str] = (), *, model: str = "") -> Iterator[EditEvaluation]:
        """Test edits once more; arguments and errors are those of the client."""
        from edge_runtime.client import EditEvaluation
        from edge_runtime.daemon.editing import check_testable

        chosen = [self._store.get(name) for name in names]
        for record in chosen:
            check_testable(record)
        models = dict.fromkeys(record.model for record in chosen) if chosen else {model or self._model: None}
        for one in models:
            with self._edits_of(one) as (engine, edits):
                records = [r for r in chosen if r.model == one] if chosen else self._applied(engine)
                for record in records:
                    yield EditEvaluation(record.name, checks_of(edits.evaluate(record)))

    def export(
        self, names: Sequence[str], path: Path, *, form: Literal["gguf", "peft"] | None = None
    ) -> None:
        """Write adapters as one; arguments and errors are those of the client."""
        from edge_runtime.client.adapter_files import AdapterWriter, form_of
        from edge_runtime.daemon.adapter_exchange import check_one_model, pieces_of, write_adapters
        from edge_runtime.model_store.store import ModelStore

        records = [self._store.get(name) for name in names]
        check_one_model(records)
        model = ModelStore().resolve(records[0].model).path
        chosen = form_of(path, form)
        with TemporaryDirectory(prefix="edgert-") as folder, AdapterWriter(path, chosen) as writer:
            files = write_adapters(self._store, records, model, chosen, Path(folder))
            for name, piece in pieces_of(files):
                writer.take(name, piece)

    def import_adapter(
        self, path: Path, name: str, *, model: str = "", form: Literal["gguf", "peft"] | None = None
    ) -> Edit:
        """Take in an adapter; arguments and errors are those of the client."""
        from edge_runtime.client.adapter_files import adapter_files, form_of
        from edge_runtime.daemon.adapter_exchange import read_adapter
        from edge_runtime.model_store.store import ModelStore

        files = adapter_files(path, form)
        found = ModelStore().resolve(model or self._model)
        with TemporaryDirectory(prefix="edgert-") as folder:
            for called, file in files.items():
                (Path(folder) / called).symlink_to(file.absolute())
            target = (self._named(), found.path)
            return edit_of(read_adapter(self._store, name, target, form_of(path, form), Path(folder)))

    def prepare(self, model: str = "") -> Iterator[PrepareProgress]:
        """Measure what edits need to know of a model; arguments and errors are those of the client."""
        from edge_runtime.client import PrepareProgress

        with self._edits_of(model or self._model) as (_, edits), Background(edits.prepare) as preparing:
            for moment in preparing:
                yield PrepareProgress(min(moment.step / max(moment.steps, 1), 0.999))
            yield PrepareProgress(1.0, preparing.outcome().layer)

    def _applied(self, engine: Engine) -> Sequence[Record]:
        from edge_runtime.model_store.identity import model_identity

        applied = self._store.records(model_identity(engine.gguf), _APPLIED)
        return [record for record in applied if record.kind != "lora"]

    def _start(self, request: Mapping[str, Any], name: str | None) -> LocalStream:
        from edge_runtime.daemon.editing import identity_of_prepared
        from edge_runtime.model_store.store import ModelStore

        identity_of_prepared(ModelStore().resolve(self._model).path)
        loaded = self._edits_of(self._model)
        try:
            engine, edits = loaded.__enter__()
            return LocalStream(self._store, loaded, (engine, edits), self._named(), request, name)
        except BaseException:
            loaded.__exit__(None, None, None)
            raise

    def _named(self) -> str:
        """What the store calls the model: its name, or where its file is."""
        from edge_runtime.model_store.store import ModelStore

        store = ModelStore()
        found = store.resolve(self._model)
        stored = next((one for one in store if one.path == found.path), None)
        return stored.name if stored is not None else str(found.path.resolve())

    @contextmanager
    def _edits_of(self, model: str) -> Iterator[tuple[Engine, ModelEdits]]:
        from edge_runtime.daemon.editing import ModelEdits

        with loaded(model, self._threads, self._weights) as engine:
            yield engine, ModelEdits(engine, self._store)


@contextmanager
def loaded(
    model: str, threads: int | None = None, weights: Literal["repack", "mmap"] = "repack"
) -> Iterator[Engine]:
    """An engine that answers nobody.

    Args:
        model: name in the store, or a file.
    """
    from edge_runtime.engine.engine import Engine, EngineOptions
    from edge_runtime.model_store.store import ModelStore

    found = ModelStore().resolve(model)
    options = EngineOptions(threads=threads, context=_CONTEXT, weights=weights)
    with Bar(f"loading {found.name}") as bar:
        engine = Engine.load(found.path, options, bar.update)
    with engine:
        yield engine
