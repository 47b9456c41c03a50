"""``edgert edits apply``."""

from __future__ import annotations

import click

from edge_runtime.cli.options import json_option


@click.command("apply")
@click.argument("names", nargs=-1, required=True, metavar="NAME|NUMBER...")
@json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Apply edits that were rejected or undone.

    They come back as they were found, without a new search; so do adapters.
    """
    from edge_runtime.cli.edits.desk import any_desk
    from edge_runtime.cli.edits.view import tell_changed

    with any_desk() as edits:
        found = [edits.reapply(name) for name in names]
    tell_changed("applied", found, as_json=as_json)
