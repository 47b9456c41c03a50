"""Who this device is in its cluster: a name, a key, and the certificate that binds them.

In ``HOME/cluster/``::

    authority.pem   the authority's certificate, on every member
    authority.key   its key, only on the device that founded the cluster and invites others
    member.pem      this device's certificate; it is written last, so that where it is, all is
    member.key      its key
    cluster.db      members and invitations

Server names are part of the certificates: a caller that knows whom it wants to reach asks for
``NAME.member.edgert.internal`` and so cannot be answered by another member; one that knows an address alone
asks for ``member.edgert.internal``; and ``authority.edgert.internal`` is the founder alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.private_authority import pem_of_key, read_certificate, read_key
from edge_runtime.private_files import check_key_permissions, write_file

if TYPE_CHECKING:
    import grpc
    from cryptography.hazmat.primitives.asymmetric import ec

FOLDER = "cluster"
AUTHORITY_CERTIFICATE, AUTHORITY_KEY = "authority.pem", "authority.key"
MEMBER_CERTIFICATE, MEMBER_KEY = "member.pem", "member.key"
DATABASE = "cluster.db"

ANY_MEMBER = "member.edgert.internal"
FOUNDER = "authority.edgert.internal"
MAX_NAME = 40  # so that a name with a suffix and the domain stays one valid host name, and a common name

ORIGIN = "`edgert cluster invite` or `edgert cluster join` makes it"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Identity:
    """This device as a member.

    Attributes:
        name: unique in the cluster.
        certificate, key, authority: PEM.
        fingerprint: SHA-256 of the authority's certificate, hexadecimal: which cluster it is.
        is_founder: whether it holds the authority's key and invites others.
    """

    name: str
    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes
    fingerprint: str
    is_founder: bool

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that talks to holders of the authority's certificates only."""
        import grpc

        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels to other members; name the one that is meant with :func:`server_name`."""
        import grpc

        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def server_name(name: str) -> str:
    """What a member's certificate calls it as a server."""
    return f"{name}.{ANY_MEMBER}"


def check_name(name: str) -> str:
    """A member's name, if it can be one.

    Raises:
        RequestError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name[:80]!r} is no name for a device; use a-z, 0-9 and '-' inside, "
            f"at most {MAX_NAME} characters"
        )
    return name


def name_from(host: str) -> str:
    """The name that suits a device of this host name: ``Küche_Pi.local`` becomes ``k-che-pi``."""
    words = re.findall(r"[a-z0-9]+", host.partition(".")[0].lower())
    return "-".join(words)[:MAX_NAME].strip("-") or "device"


def folder_of(home: Path) -> Path:
    """Where a home folder keeps its cluster."""
    return home / FOLDER


def database_of(home: Path) -> Path:
    """The cluster's database of a home folder."""
    return home / FOLDER / DATABASE


def read_identity(home: Path) -> Identity | None:
    """This device's identity; None where it belongs to no cluster.

    Raises:
        ConfigError: a file is missing, damaged or too widely readable, or they do not belong together.
    """
    folder = folder_of(home)
    path = folder / MEMBER_CERTIFICATE
    if not path.exists():
        return None
    check_key_permissions(folder / MEMBER_KEY, ORIGIN)
    try:
        certificate, authority = read_certificate(path), read_certificate(folder / AUTHORITY_CERTIFICATE)
        key = read_key(folder / MEMBER_KEY)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; {ORIGIN}") from error
    if certificate.public_key() != key.public_key():
        raise ConfigError(
            f"{folder / MEMBER_KEY} is not the key of {path}; put back the right one, or run "
            "`edgert cluster leave --force` and join again"
        )
    return identity_of(certificate, key, authority)


def identity_of(
    certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, authority: x509.Certificate
) -> Identity:
    """The identity that a certificate gives.

    Raises:
        ConfigError: the certificate is no member's of this authority, or has ended.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificate.verify_directly_issued_by(authority)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        (name,) = (check_name(str(found.value)) for found in names)
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise ConfigError(
            "the certificate of this device is none of its cluster's authority; run "
            "`edgert cluster leave --force` and join again"
        ) from error
    return Identity(
        name=name,
        certificate=certificate.public_bytes(Encoding.PEM),
        key=pem_of_key(key),
        authority=authority.public_bytes(Encoding.PEM),
        fingerprint=authority.fingerprint(hashes.SHA256()).hex(),
        is_founder=FOUNDER in alternative.get_values_for_type(x509.DNSName),
    )


def keep_identity(home: Path, identity: Identity) -> None:
    """Write an identity to the disk; killed at any moment, it is there as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    folder = folder_of(home)
    write_file(folder / MEMBER_KEY, identity.key, 0o600)
    write_file(folder / AUTHORITY_CERTIFICATE, identity.authority, 0o644)
    write_file(folder / MEMBER_CERTIFICATE, identity.certificate, 0o644)


def forget_identity(home: Path) -> None:
    """Take everything about its cluster off this device.

    Raises:
        OSError: a file cannot be removed.
    """
    folder = folder_of(home)
    names = (MEMBER_CERTIFICATE, MEMBER_KEY, AUTHORITY_KEY, AUTHORITY_CERTIFICATE)
    databases = (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}.lock")
    for name in (*names, *databases):  # what makes it an identity first
        (folder / name).unlink(missing_ok=True)
