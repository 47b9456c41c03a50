"""``edgert edits show``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("show")
@click.argument("name", metavar="NAME|NUMBER")
@json_option
def command(name: str, as_json: bool) -> None:
    """Show an edit and what its checks found."""
    from edge_runtime.cli.edits.desk import any_desk
    from edge_runtime.cli.edits.view import show_edit

    with any_desk() as edits:
        found = edits.show(name)
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        show_edit(found)
