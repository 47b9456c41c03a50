"""``edgert models import``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import size_text
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import ModelNotFoundError


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Its name in the store.  [default: the file's]")
@click.option("--copy", is_flag=True, help="Make a copy of its own, even where a hard link would do.")
@click.option("--replace", is_flag=True, help="Take the place of a model of the same name.")
@json_option
def command(path: Path, name: str | None, copy: bool, replace: bool, as_json: bool) -> None:
    """Put a GGUF file of yours into the store.

    On the same disk it takes no further space: the store gets a hard link, and either name may be removed
    without the other. A file that will be changed in place needs --copy.
    """
    from edge_runtime.model_store.store import ModelStore, name_of

    if not path.is_file():
        raise ModelNotFoundError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; give a GGUF file"
        )
    with Bar(f"importing {path.name}", counts_bytes=True) as bar:
        model = ModelStore().add_file(
            name or name_of(path.name), path, copy=copy, replace=replace, progress=bar.update
        )
    size = model.path.stat().st_size
    if as_json:
        facts = {"name": model.name, "path": str(model.path), "sha256": model.sha256, "source": model.source}
        click.echo(json.dumps({**facts, "size": size}))
        return
    click.echo(f"{model.name}: {size_text(size)}, sha256 {model.sha256}")
