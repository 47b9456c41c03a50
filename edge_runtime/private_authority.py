"""A private certificate authority on elliptic curves (P-256), and certificates that it signs.

Needs ``cryptography``; nothing here is kept, and no file is written.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.errors import ConfigError

AUTHORITY_DAYS = 3650
_BACKDATED = timedelta(days=1)  # clients whose clock is slow
_SENSIBLE = datetime(2025, 1, 1, tzinfo=UTC)  # a board without a battery starts in 1970


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate and key; None where its owner keeps the key elsewhere."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None


def make_authority(kind: str, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new authority, signed by itself, which may sign devices' certificates but no further authorities.

    Args:
        kind: the first words of its name.
    """
    key = new_key()
    # The number tells authorities of the same device apart in a phone's list of them.
    name = _name(f"{kind} of {socket.gethostname()[:32]} {x509.random_serial_number() % 16**6:06x}")
    certificate = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def sign_certificate(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    *,
    subject: str,
    hosts: Iterable[str] = (),
    serves: bool = True,
    now: datetime,
    expires: datetime,
) -> x509.Certificate:
    """A certificate of the authority for somebody's public key.

    Args:
        key: the authority's.
        subject: common name, at most 64 characters.
        hosts: names and IP addresses that a server with it may go by.
        serves: whether it is good for servers as well as for clients.
        expires: its last moment; the authority's own if that is earlier.
    """
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if serves:
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    expires = min(expires, authority.not_valid_after_utc)
    builder = _builder(_name(subject), authority.subject, public_key, now, expires)
    names = [_general_name(host) for host in hosts]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def pem_of_certificate(certificate: x509.Certificate) -> bytes:
    """A certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as text (PKCS #8), not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The certificate in a PEM file.

    Raises:
        ConfigError: it holds none.
        OSError: it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate in PEM; put back a copy or move it away") from error


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in a PEM file.

    Raises:
        ConfigError: it holds none, or none on an elliptic curve.
        OSError: it cannot be read.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key in PEM; put back a copy or move it away") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no elliptic-curve key; put back a copy or move it away")
    return key


def sensible_now() -> datetime:
    """This moment in UTC, in whole seconds.

    Raises:
        ConfigError: the clock was never set.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    if now < _SENSIBLE:
        raise ConfigError(
            f"this device's clock says {now:%Y-%m-%d}, which would make invalid certificates; set it first "
            "(timedatectl set-ntp true, or date -s)"
        )
    return now


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    expires: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
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
