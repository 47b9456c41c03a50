"""The cluster's authority: it lives on the device that founded the cluster, and signs for who was invited.

Members' certificates are good as long as the authority's: who may take part is decided by the table of
members, with every call, and no device has to renew anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from edge_runtime.cluster.identity import (
    ANY_MEMBER,
    AUTHORITY_CERTIFICATE,
    AUTHORITY_KEY,
    FOUNDER,
    ORIGIN,
    Identity,
    check_name,
    database_of,
    folder_of,
    identity_of,
    keep_identity,
    read_identity,
    server_name,
)
from edge_runtime.cluster.members import Members
from edge_runtime.errors import ConfigError, ForbiddenError, RequestError
from edge_runtime.model_store.files import exclusive
from edge_runtime.private_authority import (
    make_authority,
    new_key,
    pem_of_certificate,
    pem_of_key,
    read_certificate,
    read_key,
    sensible_now,
    sign_certificate,
)
from edge_runtime.private_files import check_key_permissions, make_file, write_file

INVITATION = "invitation:"  # a certificate of that common name is good for Join alone
MAX_SIGNING_REQUEST = 4096  # bytes; ours has 250
# Beyond the invitation itself, so that who comes too late is told so; the table of invitations decides.
_GRACE = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class ClusterAuthority:
    """Signs certificates.

    Attributes:
        certificate: its own.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def sign_member(
        self, public_key: ec.EllipticCurvePublicKey, name: str, *, is_founder: bool = False
    ) -> x509.Certificate:
        """A member's certificate.

        Raises:
            RequestError: the name cannot be one.
        """
        return sign_certificate(
            self.certificate,
            self.key,
            public_key,
            subject=check_name(name),
            hosts=[server_name(name), ANY_MEMBER, *([FOUNDER] if is_founder else [])],
            now=sensible_now(),
            expires=self.certificate.not_valid_after_utc,
        )

    def sign_invitation(
        self, public_key: ec.EllipticCurvePublicKey, identifier: str, expires: float
    ) -> x509.Certificate:
        """An invitation's certificate, good for clients only.

        Args:
            expires: the invitation's end, Unix time in seconds.
        """
        return sign_certificate(
            self.certificate,
            self.key,
            public_key,
            subject=f"{INVITATION}{identifier}",
            serves=False,
            now=sensible_now(),
            expires=datetime.fromtimestamp(expires, UTC) + _GRACE,
        )


def found_cluster(home: Path, name: str, address: str) -> Identity:
    """This device's identity; where it belongs to no cluster, a new one with it as the first member.

    Args:
        name: for this device, where there is no identity yet.
        address: HOST:PORT of its Cluster service, as others reach it.

    Raises:
        RequestError: the name or the address cannot be one.
        ConfigError: what is there is damaged, or the clock is wrong.
    """
    lock = folder_of(home) / "cluster.lock"
    make_file(lock)
    with exclusive(lock, wait=True):
        found = read_identity(home)
        members = Members(database_of(home))
        if found is None:
            authority = _make_authority(home)
            key = new_key()
            certificate = authority.sign_member(key.public_key(), name, is_founder=True)
            found = identity_of(certificate, key, authority.certificate)
            members.add_founder(name, address)
            keep_identity(home, found)
        elif found.is_founder:
            members.add_founder(found.name, address)
    return found


def open_authority(home: Path) -> ClusterAuthority:
    """The authority whose key this device holds.

    Raises:
        ForbiddenError: it holds none: another device founded the cluster, or there is none.
        ConfigError: the files are damaged or too widely readable.
    """
    folder = folder_of(home)
    if not (folder / AUTHORITY_KEY).exists():
        raise ForbiddenError(
            "only the device that founded the cluster can invite others; run `edgert cluster invite` there"
        )
    return _read_authority(folder)


def public_key_of(signing_request: bytes) -> ec.EllipticCurvePublicKey:
    """The key for which a device asks a certificate; whatever else it asks for is not granted.

    Raises:
        RequestError: it is no PKCS #10 request on P-256 that its own key signed.
    """
    if not 0 < len(signing_request) <= MAX_SIGNING_REQUEST:
        raise RequestError(
            f"the signing request has {len(signing_request)} bytes; needed are 1 to {MAX_SIGNING_REQUEST}"
        )
    try:
        request = x509.load_der_x509_csr(signing_request)
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RequestError("the signing request is no PKCS #10 request in DER") from error
    if not (sound and isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise RequestError("the signing request must be on the curve P-256 and signed with its own key")
    return key


def _make_authority(home: Path) -> ClusterAuthority:
    folder = folder_of(home)
    if (folder / AUTHORITY_CERTIFICATE).exists() and (folder / AUTHORITY_KEY).exists():
        return _read_authority(folder)  # of a founding that was cut short
    certificate, key = make_authority("edgert cluster", sensible_now())
    write_file(folder / AUTHORITY_KEY, pem_of_key(key), 0o600)
    write_file(folder / AUTHORITY_CERTIFICATE, pem_of_certificate(certificate), 0o644)
    return ClusterAuthority(certificate, key)


def _read_authority(folder: Path) -> ClusterAuthority:
    check_key_permissions(folder / AUTHORITY_KEY, ORIGIN)
    try:
        certificate = read_certificate(folder / AUTHORITY_CERTIFICATE)
        key = read_key(folder / AUTHORITY_KEY)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; {ORIGIN}") from error
    if certificate.public_key() != key.public_key():
        raise ConfigError(
            f"{folder / AUTHORITY_KEY} is not the key of {folder / AUTHORITY_CERTIFICATE}; put back both "
            "from a copy, or remove the folder and invite every device anew"
        )
    return ClusterAuthority(certificate, key)
