"""A private authority for one home: it signs the server's certificate, and clients trust it alone.

Needs ``cryptography``; only ``edgert init`` imports this, the daemon does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from edge_runtime.daemon.certificates import (
    CA_CERTIFICATE,
    CA_KEY,
    FOLDER,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    normal_host,
)
from edge_runtime.errors import ConfigError
from edge_runtime.private_authority import (
    Authority,
    make_authority,
    new_key,
    pem_of_certificate,
    pem_of_key,
    read_certificate,
    read_key,
    sensible_now,
    sign_certificate,
)
from edge_runtime.private_files import check_key_permissions, write_file

SERVER_DAYS = 825  # what browsers and phones accept at most of a private authority
RENEW_DAYS = 30  # before the end
_ALWAYS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """The server's certificate as it lies on the disk.

    Attributes:
        hosts: names and addresses that it is good for.
        expires: its last moment, in UTC.
        sound: signed by the authority, and the key belongs to it.
    """

    hosts: tuple[str, ...]
    expires: datetime
    sound: bool


def ensure_authority(home: Path, *, now: datetime | None = None) -> tuple[Authority, bool]:
    """The authority of a home; made where there is none. Second: whether it is new.

    Raises:
        ConfigError: it is damaged, too widely readable or at its end, or the clock is wrong.
    """
    folder = home / FOLDER
    certificate, key = folder / CA_CERTIFICATE, folder / CA_KEY
    if not certificate.exists():
        # A key without a certificate is what a crash between the two leaves; nothing was signed with it yet.
        made, made_key = make_authority("edgert authority", now or sensible_now())
        write_file(key, pem_of_key(made_key), 0o600)
        write_file(certificate, pem_of_certificate(made), 0o644)
        return Authority(made, made_key), True
    if key.exists():
        check_key_permissions(key)
    found = Authority(read_certificate(certificate), read_key(key) if key.exists() else None)
    if found.key is not None and found.certificate.public_key() != found.key.public_key():
        raise ConfigError(
            f"{key} is not the key of {certificate}; put back the right one, or move {folder} away, run "
            "`edgert init` again and copy the new ca.pem to every client"
        )
    end = found.certificate.not_valid_after_utc
    if end <= (now or sensible_now()):
        raise ConfigError(
            f"{certificate} ended on {end:%Y-%m-%d}; move {folder} away, run "
            "`edgert init` again and copy the new ca.pem to every client"
        )
    return found, False


def read_server(home: Path, authority: Authority) -> ServerCertificate | None:
    """The server's certificate; None where it or its key is missing or no certificate at all.

    Raises:
        ConfigError: the key is too widely readable.
    """
    certificate, key = home / FOLDER / SERVER_CERTIFICATE, home / FOLDER / SERVER_KEY
    if not (certificate.exists() and key.exists()):
        return None
    check_key_permissions(key)
    try:
        found, found_key = read_certificate(certificate), read_key(key)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ConfigError, x509.ExtensionNotFound):
        return None
    try:
        found.verify_directly_issued_by(authority.certificate)
        sound = found.public_key() == found_key.public_key()
    except (ValueError, TypeError, InvalidSignature):
        sound = False
    return ServerCertificate(tuple(str(name.value) for name in names), found.not_valid_after_utc, sound=sound)


def issue_server(
    home: Path, authority: Authority, hosts: Iterable[str], *, now: datetime | None = None
) -> ServerCertificate:
    """Make a key and a certificate for the server, good for these hosts and for this device itself.

    Raises:
        ConfigError: a host is neither a name nor an address, the authority's key is kept elsewhere, or the
            clock is wrong.
    """
    if authority.key is None:
        raise ConfigError(
            f"a new server certificate is needed, but {home / FOLDER / CA_KEY} is not there to sign it; put "
            "it back for a moment"
        )
    now = now or sensible_now()
    names = tuple(dict.fromkeys([*map(normal_host, hosts), *_ALWAYS]))
    key = new_key()
    certificate = sign_certificate(
        authority.certificate,
        authority.key,
        key.public_key(),
        subject=f"edgert {names[0]}"[:64],
        hosts=names,
        now=now,
        expires=now + timedelta(days=SERVER_DAYS),
    )
    # A crash between the two leaves a key of another certificate; `edgert init` sees that and issues anew.
    write_file(home / FOLDER / SERVER_KEY, pem_of_key(key), 0o600)
    write_file(home / FOLDER / SERVER_CERTIFICATE, pem_of_certificate(certificate), 0o644)
    return ServerCertificate(names, certificate.not_valid_after_utc, sound=True)


def renewal_reason(
    found: ServerCertificate | None, hosts: Iterable[str], *, now: datetime | None = None
) -> str:
    """Why a new server certificate is needed; empty if it is not."""
    if found is None:
        return "there was none"
    if not found.sound:
        return "the one there was is not of this authority, or its key was another one's"
    if found.expires - (now or sensible_now()) < timedelta(days=RENEW_DAYS):
        return f"the one there was ends on {found.expires:%Y-%m-%d}"
    lacking = [host for host in map(normal_host, hosts) if host not in found.hosts]
    return f"the one there was lacks {', '.join(lacking)}" if lacking else ""


def fingerprint(authority: Authority) -> str:
    """SHA-256 of the authority's certificate, to compare on another device."""
    return authority.certificate.fingerprint(hashes.SHA256()).hex(":")
