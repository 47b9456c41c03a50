"""``edgert cluster invite``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.options import json_option
from edge_runtime.errors import ForbiddenError, RequestError

if TYPE_CHECKING:
    from edge_runtime.cluster.identity import Identity
    from edge_runtime.cluster.invitation import Invitation

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")


@click.command("invite")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Where the other device reaches this one; may be repeated.  [default: all addresses of this device]",
)
@click.option(
    "--valid",
    default="15m",
    show_default=True,
    metavar="TIME",
    help="For how long, such as 90s, 15m, 2h or 7d.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Of this device, if it founds the cluster with this.  [default: from its host name]",
)
@json_option
def command(addresses: tuple[str, ...], valid: str, name: str | None, as_json: bool) -> None:
    """Let another device join; the first time, found a cluster.

    The invitation is all that is written to standard output. It is a secret, and serves one device once.
    """
    from edge_runtime.cli.cluster.daemon_part import have_daemon_look
    from edge_runtime.cli.cluster.own_address import addresses_for_guests, cluster_config, completed
    from edge_runtime.cluster.invitation import MAX_ADDRESSES, make_invitation
    from edge_runtime.model_store.paths import home

    seconds = _seconds(valid)
    config = cluster_config()
    reached_at = [completed(address, config) for address in addresses]
    reached_at = reached_at or addresses_for_guests(config)[:MAX_ADDRESSES]
    identity, is_new = _founder(home(), name, reached_at[0])
    invitation = make_invitation(home(), reached_at, valid_seconds=seconds)
    in_force, notice = have_daemon_look(home(), identity.name)
    if as_json:
        facts = {
            "name": identity.name,
            "founded": is_new,
            "invitation": invitation.text(),
            "addresses": list(invitation.addresses),
            "expires": invitation.expires,
            "in_force": in_force,
        }
        click.echo(json.dumps(facts))
    else:
        _show(identity, invitation, valid, is_new=is_new)
    if notice:
        click.secho(notice, dim=in_force, fg=None if in_force else "yellow", err=True)


def _seconds(text: str) -> float:
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None:
        raise RequestError(f"--valid {text[:40]!r} is no span of time; give a number and s, m, h or d: 15m")
    return float(found[1]) * _UNITS[found[2]]


def _founder(home: Path, name: str | None, address: str) -> tuple[Identity, bool]:
    """This device as the founder of its cluster, and whether it has just become that.

    Raises:
        ForbiddenError: another device founded the cluster.
        RequestError: it has another name already.
    """
    import socket

    from edge_runtime.cluster.authority import found_cluster
    from edge_runtime.cluster.identity import database_of, name_from, read_identity
    from edge_runtime.cluster.members import Members

    before = read_identity(home)
    if before is not None and not before.is_founder:
        founder = Members(database_of(home)).founder()
        where = f"{founder.name} ({founder.address})" if founder is not None else "the device that founded it"
        raise ForbiddenError(
            f"this device is in a cluster already, as {before.name}, and only {where} can invite others to "
            "it: run `edgert cluster invite` there"
        )
    if before is not None and name not in (None, before.name):
        raise RequestError(
            f"this device founded its cluster as {before.name}, and keeps that name; leave --name away"
        )
    identity = found_cluster(home, name or name_from(socket.gethostname()), address)
    return identity, before is None


def _show(identity: Identity, invitation: Invitation, valid: str, *, is_new: bool) -> None:
    if is_new:
        click.echo(f"This device, {identity.name}, has founded a cluster.", err=True)
    on_terminal = sys.stdout.isatty()
    what = "this" if on_terminal else "`edgert cluster join INVITATION`, with the invitation below,"
    click.echo(f"Run {what} on the other device within {valid}. It serves once, and is a secret.", err=True)
    if on_terminal:
        click.echo("\nedgert cluster join ", nl=False, err=True)
    click.echo(invitation.text())
    if on_terminal:
        click.echo(err=True)
    places = ", ".join(invitation.addresses)
    click.secho(f"The other device will look for this one at {places}.", dim=True, err=True)
