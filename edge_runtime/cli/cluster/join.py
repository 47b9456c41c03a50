"""``edgert cluster join``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import size_text
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.daemon.config import ClusterConfig

_MOST_CHARACTERS = 1 << 16


@click.command("join")
@click.argument("invitation")
@click.option(
    "--name",
    metavar="NAME",
    help="Of this device; where it is taken, a number is added.  [default: from its host name]",
)
@click.option(
    "--address",
    metavar="HOST[:PORT]",
    help="Where other members reach this device.  [default: the address that they see]",
)
@json_option
def command(invitation: str, name: str | None, address: str | None, as_json: bool) -> None:
    """Join with an invitation.

    INVITATION is what `edgert cluster invite` printed on another device. With `-` it is read from standard
    input, so that it is in no list of processes or history of commands.
    """
    import asyncio
    import socket

    from edge_runtime.cli.cluster.daemon_part import have_daemon_look
    from edge_runtime.cli.cluster.own_address import address_as_guest, cluster_config, completed
    from edge_runtime.cluster.identity import database_of, name_from
    from edge_runtime.cluster.joining import join
    from edge_runtime.cluster.members import Members
    from edge_runtime.model_store.paths import home

    config = cluster_config()
    text = _read() if invitation == "-" else invitation
    own_address = completed(address, config) if address else address_as_guest(config)
    identity = asyncio.run(join(home(), text, name or name_from(socket.gethostname()), own_address))
    members = [member.name for member in Members(database_of(home())).active()]
    in_force, notice = have_daemon_look(home(), identity.name)
    if as_json:
        facts = {"name": identity.name, "members": members, "fingerprint": identity.fingerprint}
        click.echo(json.dumps({**facts, "in_force": in_force}))
    else:
        others = ", ".join(member for member in members if member != identity.name)
        click.echo(f"This device is {identity.name} in the cluster of {others}.")
        click.echo(_offer(config))
        click.echo("`edgert cluster status` shows the members, here and on each of them.")
    if notice:
        click.secho(notice, dim=in_force, fg=None if in_force else "yellow", err=True)


def _read() -> str:
    if sys.stdin.isatty():
        click.echo("paste the invitation, then press Enter:", err=True)
        return sys.stdin.readline(_MOST_CHARACTERS)
    text = sys.stdin.read(_MOST_CHARACTERS)
    if not text.strip():
        raise RequestError("there is no invitation on standard input")
    return text


def _offer(config: ClusterConfig) -> str:
    if not config.lend_memory_mb:
        return "It lends no memory to the others (cluster.lend_memory_mb = 0), so it works for nobody."
    return (
        f"It lends {size_text(config.lend_memory_mb << 20)} of memory to the others; cluster.lend_memory_mb "
        "in its settings changes that."
    )
