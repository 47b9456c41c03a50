"""``edgert edits cancel``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("cancel")
@click.argument("names", nargs=-1, required=True, metavar="NAME|NUMBER...")
@json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """End edits that wait or run."""
    from edge_runtime.cli.edits.desk import any_desk

    with any_desk() as edits:
        found = [edits.cancel(name) for name in names]
    if as_json:
        click.echo(json.dumps({"edits": [edit.as_json() for edit in found]}, ensure_ascii=False))
        return
    for edit in found:
        click.echo(f"cancelled {edit.name}")
