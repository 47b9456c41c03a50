"""``edgert edits list``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("list")
@click.option("-m", "--model", default="", metavar="NAME", help="Only those of this model.")
@json_option
def command(model: str, as_json: bool) -> None:
    """List the edits and adapters.

    The oldest stands first.
    """
    from edge_runtime.cli.edits.desk import any_desk
    from edge_runtime.cli.edits.view import show_list

    with any_desk() as edits:
        found = edits.list(model)
    if as_json:
        click.echo(json.dumps({"edits": [edit.as_json() for edit in found]}, ensure_ascii=False))
    elif found:
        show_list(found)
    else:
        click.echo('no edits; `edgert edit "Ann Lee lives in" --subject "Ann Lee" --target Oslo` makes one')
