"""``edgert token``: who may use the daemon."""

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "token",
    cls=LazyGroup,
    verbs={
        "create": ("edge_runtime.cli.token.create", "Make a token and show it, once."),
        "list": ("edge_runtime.cli.token.list", "List the tokens, not what they are."),
        "revoke": ("edge_runtime.cli.token.revoke", "Make a token worthless, at once."),
    },
)
def command() -> None:
    """Make, list and revoke the tokens with which programs use the daemon.

    Beyond this device the daemon answers nobody without one. Give each program and each device its own, so
    that one can be revoked without the others.
    """
