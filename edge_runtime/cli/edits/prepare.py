"""``edgert edits prepare``."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_runtime.cli.options import json_option, threads_option, weights_option
from edge_runtime.cli.remote import local_option
from edge_runtime.cli.terminal import Bar


@click.command("prepare")
@click.argument("model", default="demo", metavar="[NAME|PATH]", envvar="EDGERT_MODEL")
@threads_option
@weights_option
@local_option
@json_option
@click.pass_context
def command(context: click.Context, /, model: str, as_json: bool, **_: Any) -> None:
    """Measure what edits need to know of a model.

    The model writes some texts, and trial edits find the layer that takes them best. It takes minutes, with
    forward passes only; what is found is kept beside the model.
    """
    from edge_runtime.cli.edits.desk import desk_for

    layer = None
    with (
        desk_for(context) as (edits, name),
        Bar(f"preparing {model}", estimates=True) as bar,
    ):
        for moment in edits.prepare(name or ""):
            bar.update(moment.share)
            layer = moment.layer
    if as_json:
        click.echo(json.dumps({"model": model, "layer": layer}))
    else:
        click.echo(f"{model}: edits will change layer {layer}")
