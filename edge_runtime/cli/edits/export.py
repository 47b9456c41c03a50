"""``edgert edits export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from edge_runtime.cli.options import json_option


@click.command("export")
@click.argument("names", nargs=-1, required=True, metavar="NAME|NUMBER...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A GGUF file, or a folder for PEFT.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "peft"]),
    help="gguf: as llama.cpp loads it. peft: as the peft library loads it.  [default: by the path's end]",
)
@json_option
def command(
    names: tuple[str, ...], output: Path, form: Literal["gguf", "peft"] | None, as_json: bool
) -> None:
    """Write an edit as a LoRA that other programs load.

    Several of one model become one LoRA. Edits that stand together are solved together: export them together.
    """
    from edge_runtime.cli.edits.desk import any_desk

    with any_desk() as edits:
        edits.export(names, output, form=form)
    if as_json:
        click.echo(json.dumps({"names": list(names), "path": str(output.absolute())}))
    else:
        click.echo(f"wrote {output}")
