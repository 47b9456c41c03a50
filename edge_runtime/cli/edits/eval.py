"""``edgert edits eval``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from edge_runtime.cli.options import json_option


@click.command("eval")
@click.argument("names", nargs=-1, metavar="[NAME|NUMBER...]")
@json_option
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Test edits again, as they are now.

    Without names, all that are applied to the default model. What stands before is without that one edit, and
    with all others.
    """
    from edge_runtime.cli.edits.desk import any_desk
    from edge_runtime.cli.edits.view import show_checks
    from edge_runtime.cli.terminal import Bar

    found = []
    with any_desk() as edits, Bar("testing") as bar:
        for evaluation in edits.evaluate(names):
            found.append(evaluation)
            bar.update(len(found), len(names) or None)
            if not as_json:
                bar.close()
                click.echo(evaluation.name)
                show_checks(evaluation.checks)
    if as_json:
        click.echo(json.dumps({"edits": [asdict(one) for one in found]}, ensure_ascii=False))
    elif not found:
        click.echo("no edits are applied")
