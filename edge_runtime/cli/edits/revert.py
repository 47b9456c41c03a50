"""``edgert edits revert``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("revert")
@click.argument("names", nargs=-1, metavar="NAME|NUMBER...")
@click.option("--all", "everything", is_flag=True, help="All that are applied, the last one first.")
@json_option
def command(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Undo edits or adapters.

    The others are solved again without them. Without any, a model answers bit for bit as it did before.
    """
    from edge_runtime.cli.edits.desk import any_desk

    if bool(names) == everything:
        raise click.UsageError("Give names of edits, or --all.")
    with any_desk() as edits:
        if everything:
            names = tuple(edit.name for edit in reversed(edits.list()) if edit.state == "applied")
        found = [edits.revert(name) for name in names]
    if as_json:
        click.echo(json.dumps({"edits": [edit.as_json() for edit in found]}, ensure_ascii=False))
        return
    for edit in found:
        click.echo(f"reverted {edit.name}")
    if not found:
        click.echo("nothing is applied")
