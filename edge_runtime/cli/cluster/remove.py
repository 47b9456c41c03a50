"""``edgert cluster remove``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option
from edge_runtime.errors import ForbiddenError, RequestError


@click.command("remove")
@click.argument("name")
@json_option
def command(name: str, as_json: bool) -> None:
    """Take another device out of the cluster that this one founded.

    For one that was lost or stolen, or that left without telling. Its certificate is refused from now on:
    here at once, by the other members within half a minute.
    """
    from edge_runtime.cli.reload import reload_daemon
    from edge_runtime.cluster.identity import database_of, read_identity
    from edge_runtime.cluster.members import Members
    from edge_runtime.model_store.paths import home

    identity = read_identity(home())
    if identity is None:
        raise RequestError("this device is in no cluster")
    if not identity.is_founder:
        raise ForbiddenError(
            "only the device that founded the cluster takes others out of it; run `edgert cluster remove` "
            "there"
        )
    if name == identity.name:
        raise RequestError(f"{name} is this device; `edgert cluster leave` ends its own part")
    Members(database_of(home())).revoke(name)
    reloaded, notice = reload_daemon(home())
    if as_json:
        click.echo(json.dumps({"name": name, "in_force": reloaded}))
    else:
        click.echo(f"{name} is no member any more.")
    if notice:
        click.secho(notice, dim=reloaded, err=True)
