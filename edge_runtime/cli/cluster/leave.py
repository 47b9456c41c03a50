"""``edgert cluster leave``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("leave")
@click.option(
    "--force", is_flag=True, help="Leave even where the founder cannot be told, or where this device is it."
)
@json_option
def command(force: bool, as_json: bool) -> None:
    """Leave the cluster.

    The founder is told, and no member talks with this device any more. It may join again with a new
    invitation.
    """
    import asyncio

    from edge_runtime.cli.cluster.daemon_part import have_daemon_look
    from edge_runtime.cluster.joining import leave
    from edge_runtime.model_store.paths import home

    identity = asyncio.run(leave(home(), force=force))
    in_force, notice = have_daemon_look(home(), None)
    name = identity.name if identity is not None else ""
    if as_json:
        click.echo(json.dumps({"name": name, "in_force": in_force}))
    elif name:
        click.echo(f"{name} has left the cluster.")
    else:
        click.echo("This device is in no cluster.")
    if notice:
        click.secho(notice, dim=in_force, fg=None if in_force else "yellow", err=True)
