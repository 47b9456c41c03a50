"""A private authority for one home: it signs the server's certificate, and clients trust it alone.

Needs ``cryptography``; only ``edgert init`` imports this, the daemon does not.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.daemon.certificates import (
    CA_CERTIFICATE,
    CA_KEY,
    FOLDER,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    normal_host,
)
from edge_runtime.daemon.private_files import check_key_permissions, write_file
from edge_runtime.errors import ConfigError

CA_DAYS = 3650
SERVER_DAYS = 825  # what browsers and phones accept at most of a private authority
RENEW_DAYS = 30  # before the end
_BACKDATED = timedelta(days=1)  # clients whose clock is slow
_SENSIBLE = datetime(2025, 1, 1, tzinfo=UTC)  # a board without a battery starts in 1970
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


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate and key; None where its owner keeps the key elsewhere."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None


def ensure_authority(home: Path, *, now: datetime | None = None) -> tuple[Authority, bool]:
    """The authority of a home; made where there is none. Second: whether it is new.

    Raises:
        ConfigError: it is damaged, too widely readable or at its end, or the clock is wrong.
    """
    folder = home / FOLDER
    certificate, key = folder / CA_CERTIFICATE, folder / CA_KEY
    if not certificate.exists():
        # A key without a certificate is what a crash between the two leaves; nothing was signed with it yet.
        new_key = ec.generate_private_key(ec.SECP256R1())
        made = _make_authority(new_key, now or _now())
        write_file(key, _pem_of(new_key), 0o600)
        write_file(certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)
        return Authority(made, new_key), True
    if key.exists():
        check_key_permissions(key)
    found = Authority(_read_certificate(certificate), _read_key(key) if key.exists() else None)
    if found.key is not None and found.certificate.public_key() != found.key.public_key():
        raise ConfigError(
            f"{key} is not the key of {certificate}; put back the right one, or move {folder} away, run "
            "`edgert init` again and copy the new ca.pem to every client"
        )
    end = found.certificate.not_valid_after_utc
    if end <= (now or _now()):
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
        found, found_key = _read_certificate(certificate), _read_key(key)
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
    now = now or _now()
    names = tuple(dict.fromkeys([*map(normal_host, hosts), *_ALWAYS]))
    key = ec.generate_private_key(ec.SECP256R1())
    expires = min(now + timedelta(days=SERVER_DAYS), authority.certificate.not_valid_after_utc)
    certificate = (
        _builder(_name(f"edgert {names[0]}"[:64]), authority.certificate.subject, key, now, expires)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )
    # A crash between the two leaves a key of another certificate; `edgert init` sees that and issues anew.
    write_file(home / FOLDER / SERVER_KEY, _pem_of(key), 0o600)
    write_file(
        home / FOLDER / SERVER_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644
    )
    return ServerCertificate(names, certificate.not_valid_after_utc, sound=True)


def renewal_reason(
    found: ServerCertificate | None, hosts: Iterable[str], *, now: datetime | None = None
) -> str:
    """Why a new server certificate is needed; empty if it is not."""
    if found is None:
        return "there was none"
    if not found.sound:
        return "the one there was is not of this authority, or its key was another one's"
    if found.expires - (now or _now()) < timedelta(days=RENEW_DAYS):
        return f"the one there was ends on {found.expires:%Y-%m-%d}"
    lacking = [host for host in map(normal_host, hosts) if host not in found.hosts]
    return f"the one there was lacks {', '.join(lacking)}" if lacking else ""


def fingerprint(authority: Authority) -> str:
    """SHA-256 of the authority's certificate, to compare on another device."""
    return authority.certificate.fingerprint(hashes.SHA256()).hex(":")


def _make_authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # The number tells authorities of the same device apart in a phone's list of them.
    name = _name(f"edgert authority of {socket.gethostname()[:32]} {x509.random_serial_number() % 16**6:06x}")
    return (
        _builder(name, name, key, now, now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signature: bool = False, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate in PEM; put back a copy or move it away") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key in PEM; put back a copy or move it away") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no elliptic-curve key; put back a copy or move it away")
    return key


def _now() -> datetime:
    now = datetime.now(UTC).replace(microsecond=0)
    if now < _SENSIBLE:
        raise ConfigError(
            f"this device's clock says {now:%Y-%m-%d}, which would make invalid certificates; set it first "
            "(timedatectl set-ntp true, or date -s)"
        )
    return now
