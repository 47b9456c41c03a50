"""``edgert edits remove``."""

from __future__ import annotations

import click

from edge_runtime.cli.options import json_option


@click.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME|NUMBER...")
@json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Delete edits that are not applied.

    What they were asked for goes with them; adapters can be deleted too.
    """
    from edge_runtime.cli.edits.desk import any_desk
    from edge_runtime.cli.edits.view import tell_changed

    with any_desk() as edits:
        found = [edits.remove(name) for name in names]
    tell_changed("removed", found, as_json=as_json)
