"""``edgert edits import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from edge_runtime.cli.options import json_option, model_option
from edge_runtime.cli.remote import local_option


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="What to call it.  [default: the file's or folder's name]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "peft"]),
    help="gguf: a LoRA of llama.cpp. peft: a folder of the peft library.  [default: by what the path is]",
)
@model_option
@local_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    path: Path,
    name: str | None,
    form: Literal["gguf", "peft"] | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Apply a LoRA that was made elsewhere.

    PATH is a GGUF file, or a folder with adapter_config.json and adapter_model.safetensors. `edgert edits
    revert` takes it away again.
    """
    from edge_runtime.cli.edits.desk import desk_for

    with desk_for(context) as (edits, model):
        found = edits.import_adapter(path, name or path.absolute().stem, model=model or "", form=form)
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        click.echo(f"applied {found.name} to {found.model}")
