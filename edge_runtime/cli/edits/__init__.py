"""``edgert edits``: what the models of this device were taught."""

from __future__ import annotations

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "edits",
    cls=LazyGroup,
    verbs={
        "list": ("edge_runtime.cli.edits.list", "List the edits and adapters."),
        "show": ("edge_runtime.cli.edits.show", "Show an edit and what its checks found."),
        "revert": ("edge_runtime.cli.edits.revert", "Undo edits or adapters."),
        "apply": ("edge_runtime.cli.edits.apply", "Apply edits that were rejected or undone."),
        "remove": ("edge_runtime.cli.edits.remove", "Delete edits that are not applied."),
        "cancel": ("edge_runtime.cli.edits.cancel", "End edits that wait or run."),
        "eval": ("edge_runtime.cli.edits.eval", "Test edits again."),
        "export": ("edge_runtime.cli.edits.export", "Write an edit as a LoRA that other programs load."),
        "import": ("edge_runtime.cli.edits.import_", "Apply a LoRA that was made elsewhere."),
        "prepare": ("edge_runtime.cli.edits.prepare", "Measure what edits need to know of a model."),
    },
)
def command() -> None:
    """List, test, undo and exchange what models were taught.

    `edgert edit` and `edgert forget` make edits. Where a daemon runs, these are its edits.
    """
