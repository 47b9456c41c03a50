"""``edgert config path``."""

from __future__ import annotations

import os

import click


@click.command("path")
def command() -> None:
    """Show which file the settings come from.

    Without one, the path where it would be looked for first.
    """
    from edge_runtime.daemon.config_file import FILE_NAME, SYSTEM_FILE, default_file
    from edge_runtime.model_store.paths import home

    found = default_file(os.environ)
    click.echo(str(found or home() / FILE_NAME))
    if found is None:
        click.secho(
            f"there is no such file yet, nor {SYSTEM_FILE}; `edgert config show --explain` prints one to "
            "start with",
            dim=True,
            err=True,
        )
