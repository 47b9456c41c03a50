"""``edgert edits revert``."""

from __future__ import annotations

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
    from edge_runtime.cli.edits.view import tell_changed

    if bool(names) == everything:
        raise click.UsageError("Give names of edits, or --all.")
    with any_desk() as edits:
        if everything:
            names = tuple(edit.name for edit in reversed(edits.list()) if edit.state == "applied")
        found = [edits.revert(name) for name in names]
    tell_changed("reverted", found, as_json=as_json)
    if not found and not as_json:
        click.echo("nothing is applied")
