"""``edgert token create``."""

from __future__ import annotations

import json
import time

import click

from edge_runtime.cli.options import json_option

_DAY = 86400.0


@click.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["infer", "personalize", "admin"]),
    default=["infer"],
    show_default=True,
    help="What it allows; may be repeated. admin includes the others.",
)
@click.option(
    "--expires-days",
    type=click.FloatRange(0, 36500, min_open=True),
    metavar="N",
    help="After so many days it is worthless.  [default: never]",
)
@json_option
def command(name: str, scopes: tuple[str, ...], expires_days: float | None, as_json: bool) -> None:
    """Make a token and show it, once.

    Only a hash of it is kept. The token is all that is written to standard output.
    """
    from edge_runtime.cli.reload import reload_daemon
    from edge_runtime.daemon.auth import Scope
    from edge_runtime.daemon.state import STATE_NAME
    from edge_runtime.daemon.tokens import TokenStore
    from edge_runtime.model_store.paths import home

    expires = None if expires_days is None else time.time() + expires_days * _DAY
    token = TokenStore(home() / STATE_NAME).create(name, map(Scope, scopes), expires)
    reloaded, notice = reload_daemon(home())
    if as_json:
        facts = {"name": name, "scopes": sorted(set(scopes)), "expires": expires, "token": token}
        click.echo(json.dumps({**facts, "in_force": reloaded}))
    else:
        click.echo(token)
        click.secho(
            "it is shown this once; programs send it as `Authorization: Bearer TOKEN`", dim=True, err=True
        )
    if notice:
        click.secho(notice, dim=reloaded, err=True)
