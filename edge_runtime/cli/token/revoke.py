"""``edgert token revoke``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.options import json_option


@click.command("revoke")
@click.argument("name")
@json_option
def command(name: str, as_json: bool) -> None:
    """Make a token worthless, at once."""
    from edge_runtime.cli.reload import reload_daemon
    from edge_runtime.daemon.state import STATE_NAME
    from edge_runtime.daemon.tokens import TokenStore
    from edge_runtime.model_store.paths import home

    TokenStore(home() / STATE_NAME).revoke(name)
    reloaded, notice = reload_daemon(home())
    if as_json:
        click.echo(json.dumps({"name": name, "in_force": reloaded}))
    else:
        click.echo(f"revoked {name}")
    if notice:
        click.secho(notice, dim=reloaded, err=True)
