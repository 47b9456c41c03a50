"""``edgert models rm``."""

from __future__ import annotations

import sys

import click

from edge_runtime.cli.present import size_text
from edge_runtime.errors import RequestError


@click.command("rm")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(name: str, yes: bool) -> None:
    """Remove a model from the store."""
    from edge_runtime.model_store.paths import DEMO_NAME
    from edge_runtime.model_store.store import ModelStore

    store = ModelStore()
    model = store.get(name)
    size = size_text(model.path.stat().st_size)
    if not yes and name != DEMO_NAME:
        if not sys.stdin.isatty():
            raise RequestError(f"removing {name} ({size}) needs a yes; pass --yes where nobody can be asked")
        click.confirm(f"remove {name} ({size})?", abort=True)
    store.remove(name)
    click.echo(f"removed {name} ({size})")
