"""Who makes edits: the running daemon where it can, else this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Unpack

import click

if TYPE_CHECKING:
    from edge_runtime.cli.edits.view import Making
    from edge_runtime.client import EditEvaluation, EditOptions, PrepareProgress
    from edge_runtime.personalize.edit_report import Edit


class Edits(Protocol):
    """What the client and this process both do with edits."""

    def apply(
        self,
        prompt: str,
        subject: str,
        target: str,
        *,
        paraphrases: Sequence[str],
        **options: Unpack[EditOptions],
    ) -> Making: ...
    def forget(
        self,
        queries: Iterable[tuple[str, str]],
        *,
        refusal: str | None,
        **options: Unpack[EditOptions],
    ) -> Making: ...
    def cancel(self, name: str) -> Edit: ...
    def list(self, model: str = "") -> tuple[Edit, ...]: ...
    def show(self, name: str) -> Edit: ...
    def revert(self, name: str) -> Edit: ...
    def reapply(self, name: str) -> Edit: ...
    def remove(self, name: str) -> Edit: ...
    def evaluate(self, names: Sequence[str] = (), *, model: str = "") -> Iterator[EditEvaluation]: ...
    def export(
        self, names: Sequence[str], path: Path, *, form: Literal["gguf", "peft"] | None = None
    ) -> None: ...
    def import_adapter(
        self, path: Path, name: str, *, model: str = "", form: Literal["gguf", "peft"] | None = None
    ) -> Edit: ...
    def prepare(self, model: str = "") -> Iterator[PrepareProgress]: ...


@contextmanager
def desk_for(context: click.Context) -> Iterator[tuple[Edits, str | None]]:
    """Who makes edits of the model that a command line names.

    Returns:
        edits, and the model's name in the daemon's store, empty for its default; None where this process
        makes them.
    """
    from edge_runtime.cli.remote import client_for

    found = client_for(context)
    if found is None:
        from edge_runtime.cli.edits.local import LocalEdits

        asked = context.params
        yield LocalEdits(asked["model"], asked.get("threads"), asked.get("weights", "repack")), None
        return
    client, model, _ = found
    with client:
        yield client.edits, model


@contextmanager
def any_desk() -> Iterator[Edits]:
    """Who knows of this device's edits: the running daemon, else this user's store."""
    from edge_runtime.cli.remote import running_daemon

    running = running_daemon()
    if running is None or not running.grpc:
        from edge_runtime.cli.edits.local import LocalEdits
        from edge_runtime.model_store.paths import DEMO_NAME

        yield LocalEdits(DEMO_NAME)
        return
    from edge_runtime.client import Client

    with Client.local() as client:
        yield client.edits
