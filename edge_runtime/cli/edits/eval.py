"""``edgert edits eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from edge_runtime.cli.options import json_option, model_option, threads_option, weights_option
from edge_runtime.cli.remote import local_option


@click.command("eval")
@click.argument("names", nargs=-1, metavar="[NAME|NUMBER...]")
@model_option
@threads_option
@weights_option
@local_option
@json_option
@click.pass_context
def command(context: click.Context, /, names: tuple[str, ...], as_json: bool, **_: Any) -> None:
    """Test edits again.

    Without names, all that are applied to the model. What stands under BEFORE is without that one edit, and
    with all others.
    """
    from edge_runtime.cli.edits.desk import desk_for
    from edge_runtime.cli.edits.view import show_checks
    from edge_runtime.cli.terminal import Bar

    found = []
    with desk_for(context) as (edits, model), Bar("testing") as bar:
        for evaluation in edits.evaluate(names, model=model or ""):
            found.append(evaluation)
            if not as_json:
                bar.close()
                click.echo(evaluation.name)
                show_checks(evaluation.checks)
    if as_json:
        click.echo(json.dumps({"edits": [asdict(one) for one in found]}, ensure_ascii=False))
    elif not found:
        click.echo("no edits are applied")
