"""``edgert init``."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.options import json_option
from edge_runtime.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from edge_runtime.daemon.config import Config

TOKEN_FILE = "token"
_TOKEN_NAME = "cli"
_WILDCARDS = ("0.0.0.0", "::")


@dataclass
class _Report:
    """What there is after all.

    Attributes:
        lines: (whether it was made now, what it is, where it lies).
    """

    lines: list[tuple[bool, str, Path]] = field(default_factory=list)
    hosts: tuple[str, ...] = ()
    expires: datetime | None = None
    fingerprint: str = ""


@click.command("init")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name or address by which clients reach this device; may be repeated. Its own are always there.",
)
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="Where new settings let the daemon listen; 0.0.0.0: for every device that reaches this one.  "
    "[default: 127.0.0.1]",
)
@click.option(
    "--force-renew", is_flag=True, help="Make a new server certificate, even if the old one is good."
)
@json_option
def command(hosts: tuple[str, ...], listen: str | None, force_renew: bool, as_json: bool) -> None:
    """Make what the daemon needs to be reached from other devices.

    A private authority, a certificate for this device, a token for your own commands, and a settings file.
    What is there already stays as it is; so this may be run again, and renews a certificate near its end.
    """
    from edge_runtime.cli.reload import reload_daemon
    from edge_runtime.model_store.files import exclusive
    from edge_runtime.model_store.paths import home
    from edge_runtime.private_files import make_file

    folder = home()
    lock = folder / "init.lock"
    make_file(lock)
    with exclusive(lock, wait=True):
        config, file, config_is_new = _settings(folder, listen)
        report = _Report()
        _ensure_certificates(folder, config, hosts, force_renew, report)
        _ensure_token(folder, report)
        if config_is_new:
            _write_settings(file, config)
        report.lines.append((config_is_new, "settings", file))
    reloaded, notice = reload_daemon(folder) if any(new for new, _, _ in report.lines) else (True, "")
    if as_json:
        click.echo(json.dumps(_as_json(folder, report, in_force=reloaded)))
    else:
        _show(folder, config, report)
    if notice:
        click.secho(notice, dim=reloaded, err=True)


def _settings(folder: Path, listen: str | None) -> tuple[Config, Path, bool]:
    """The settings that hold or shall be written, their file, and whether it is yet to be written."""
    from edge_runtime.daemon.config_file import FILE_NAME, default_file, load_config

    wanted = _new_settings(folder, listen)
    file = default_file(os.environ)
    if file is None:
        return wanted, folder / FILE_NAME, True
    config = load_config(file, {}, {})
    if listen is not None and (config.server.http, config.server.grpc) != (
        wanted.server.http,
        wanted.server.grpc,
    ):
        raise ConfigError(
            f"{file} is there already and is left as it is: it listens at "
            f"{config.server.http or 'no address'} (HTTP) and {config.server.grpc or 'no address'} (gRPC); "
            "write into it, under [server], "
            f'http = "{wanted.server.http}" and grpc = "{wanted.server.grpc}", then run this without --listen'
        )
    return config, file, False


def _new_settings(folder: Path, listen: str | None) -> Config:
    from dataclasses import replace

    from edge_runtime.daemon.certificates import (
        FOLDER,
        SERVER_CERTIFICATE,
        SERVER_KEY,
        is_exposed,
        normal_host,
    )
    from edge_runtime.daemon.config import Config

    config = Config()
    if listen is None:
        return config
    host = normal_host(listen)
    host = f"[{host}]" if ":" in host else host
    ports = (each.rpartition(":")[2] for each in (config.server.http, config.server.grpc))
    http, grpc = (f"{host}:{port}" for port in ports)
    config = replace(config, server=replace(config.server, http=http, grpc=grpc))
    if is_exposed(config):
        tls = folder / FOLDER
        server = replace(
            config.server, tls_certificate=str(tls / SERVER_CERTIFICATE), tls_key=str(tls / SERVER_KEY)
        )
        config = replace(config, server=server)
    return config


def _ensure_certificates(
    folder: Path, config: Config, hosts: tuple[str, ...], force_renew: bool, report: _Report
) -> None:
    try:
        from edge_runtime.daemon import certificate_authority as authorities
    except ImportError as error:
        raise DependencyError(
            f"certificates are made with the package cryptography, which is missing ({error}); "
            "pip install cryptography"
        ) from error
    from edge_runtime.daemon.certificates import CA_CERTIFICATE, FOLDER, SERVER_CERTIFICATE, normal_host

    wanted = [normal_host(host) for host in [*hosts, *_listening_hosts(config)]]
    authority, is_new = authorities.ensure_authority(folder)
    found = authorities.read_server(folder, authority)
    why = "you asked for it" if force_renew else authorities.renewal_reason(found, wanted)
    if why or found is None:
        kept = found.hosts if found is not None and found.sound else ()
        found = authorities.issue_server(folder, authority, [*wanted, *_own_names(), *kept])
    end = authority.certificate.not_valid_after_utc
    tls = folder / FOLDER
    report.lines.append((is_new, f"private authority, until {end:%Y-%m-%d}", tls / CA_CERTIFICATE))
    what = f"server certificate, until {found.expires:%Y-%m-%d}" + (f" ({why})" if why and not is_new else "")
    report.lines.append((bool(why), what, tls / SERVER_CERTIFICATE))
    report.hosts, report.expires = found.hosts, found.expires
    report.fingerprint = authorities.fingerprint(authority)


def _listening_hosts(config: Config) -> list[str]:
    """The names and addresses of the settings by which other devices reach this one."""
    from edge_runtime.addresses import split_address
    from edge_runtime.daemon.certificates import is_loopback

    addresses = [each for each in (config.server.http, config.server.grpc) if each and not is_loopback(each)]
    return [host for host, _ in map(split_address, addresses) if host not in _WILDCARDS]


def _own_names() -> Iterator[str]:
    """How other devices may call this one, by its host name or by its addresses of this moment."""
    from edge_runtime.addresses import interface_addresses
    from edge_runtime.daemon.certificates import normal_host

    name = socket.gethostname()
    for each in [name, f"{name.partition('.')[0]}.local", *interface_addresses()]:
        try:
            yield normal_host(each)
        except ConfigError:
            continue  # a device may be called what no certificate can hold, such as `my_pi`


def _ensure_token(folder: Path, report: _Report) -> None:
    from edge_runtime.daemon.auth import Scope, digest_of
    from edge_runtime.daemon.state import STATE_NAME
    from edge_runtime.daemon.tokens import TokenStore
    from edge_runtime.private_files import write_file

    path = folder / TOKEN_FILE
    tokens = TokenStore(folder / STATE_NAME)
    stored = list(tokens)
    what = "admin token for your own commands here"
    if path.exists():
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
        digest = digest_of(path.read_text(encoding="utf-8", errors="replace").strip())
        if any(token.digest == digest for token in stored):
            report.lines.append((False, what, path))
            return
        what += " (the one there was had been revoked)"
    names = {token.name for token in stored}
    name, number = _TOKEN_NAME, 1
    while name in names:  # its owner may have moved it to another device, where it still is of use
        number += 1
        name = f"{_TOKEN_NAME}-{number}"
    write_file(path, f"{tokens.create(name, [Scope.ADMIN])}\n".encode(), 0o600)
    report.lines.append((True, what, path))


def _write_settings(file: Path, config: Config) -> None:
    from edge_runtime.daemon.config_file import render_commented
    from edge_runtime.private_files import write_file

    write_file(file, render_commented(config).encode(), 0o644)


def _as_json(folder: Path, report: _Report, *, in_force: bool) -> dict[str, object]:
    names = ("ca", "certificate", "token_file", "config")
    return {
        "home": str(folder),
        **{name: str(path) for name, (_, _, path) in zip(names, report.lines, strict=True)},
        "made": [name for name, (is_new, _, _) in zip(names, report.lines, strict=True) if is_new],
        "hosts": list(report.hosts),
        "expires": report.expires.timestamp() if report.expires else None,
        "ca_sha256": report.fingerprint,
        "in_force": in_force,
    }


def _show(folder: Path, config: Config, report: _Report) -> None:
    from edge_runtime.addresses import split_address
    from edge_runtime.cli.present import table
    from edge_runtime.daemon.certificates import CA_CERTIFICATE, FOLDER, is_exposed

    shown = table("", "", "", header=False)
    for is_new, what, path in report.lines:
        shown.add_row("made" if is_new else "there", str(path), what)
    shown.print()
    click.echo(f"\nThe certificate is good for {', '.join(report.hosts)}.")
    if not is_exposed(config):
        click.echo(
            "The daemon listens on this device alone, where it asks for no token. For other devices, give\n"
            "server.http and server.grpc in the settings another address: 0.0.0.0:8420 and 0.0.0.0:8421."
        )
        return
    _, port = split_address(config.server.http or config.server.grpc)
    host = report.hosts[0]
    host = f"[{host}]" if ":" in host else host
    click.echo(f"""
From another device:
  1. here:  edgert token create NAME --scope infer     (shows a token for it)
  2. copy {folder / FOLDER / CA_CERTIFICATE} to it
  3. there: curl --cacert ca.pem -H "Authorization: Bearer TOKEN" https://{host}:{port}/v1/models

The authority's certificate has the SHA-256 {report.fingerprint}.
Never copy {folder / FOLDER / "ca.key"}: who has it can pretend to be this device.""")
