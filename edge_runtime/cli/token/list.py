"""``edgert token list``."""

from __future__ import annotations

import json
import time

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import table


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List the tokens, not what they are.

    When one was used last is written every few minutes.
    """
    from edge_runtime.daemon.state import STATE_NAME
    from edge_runtime.daemon.tokens import TokenStore
    from edge_runtime.model_store.paths import home

    tokens = list(TokenStore(home() / STATE_NAME))
    if as_json:
        rows = [
            {
                "name": token.name,
                "scopes": sorted(token.scopes),
                "created": token.created,
                "expires": token.expires,
                "last_used": token.last_used,
            }
            for token in tokens
        ]
        click.echo(json.dumps({"tokens": rows}))
        return
    if not tokens:
        click.echo("no tokens; `edgert token create NAME` makes one")
        return
    now = time.time()
    shown = table("NAME", "SCOPES", "CREATED", "EXPIRES", "LAST USED")
    for token in tokens:
        expires = _date(token.expires)
        if token.expires is not None and token.expires <= now:
            expires = f"expired {expires}"
        shown.add_row(
            token.name,
            ", ".join(sorted(token.scopes)),
            _date(token.created),
            expires,
            _date(token.last_used, "%Y-%m-%d %H:%M"),
        )
    shown.print()


def _date(when: float | None, form: str = "%Y-%m-%d") -> str:
    return "never" if when is None else time.strftime(form, time.localtime(when))
