"""Invitations: a text that lets one device join, once, within minutes.

``edgert1.`` and then, in base64 for URLs: the length of the rest (2 bytes), fields (each with its length in 2
bytes), and 4 bytes of a checksum, so that a paste that lost its end is told from one that was changed. The
fields are the addresses of the device that invites, the authority's certificate, a certificate that is good
for Join alone, its private key, and when all that ends.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from edge_runtime.cluster.authority import open_authority
from edge_runtime.cluster.identity import database_of
from edge_runtime.cluster.members import Members, check_address
from edge_runtime.errors import RequestError
from edge_runtime.private_authority import new_key, pem_of_certificate, pem_of_key

if TYPE_CHECKING:
    import grpc

PREFIX = "edgert1."
VALID_SECONDS = 15 * 60.0
LONGEST_SECONDS = 7 * 86_400.0
MAX_ADDRESSES = 8
MAX_CHARACTERS = 8192

_LENGTH = struct.Struct(">H")
_EXPIRES = struct.Struct(">Q")
_CHECKSUM_BYTES = 4
_KEY_BYTES = 32  # a number below the order of P-256
_IDENTIFIER_BYTES = 8
_BASE64 = re.compile(r"[A-Za-z0-9_-]*")
_OTHER_VERSION = re.compile(r"edgert\d+\.")
_AGAIN = "copy the whole text that `edgert cluster invite` printed"


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an invited device gets.

    Attributes:
        addresses: HOST:PORT under which the device that invites may be reached, likeliest first.
        authority: the authority's certificate.
        certificate: shown when joining.
        key: its private key.
        expires: Unix time in seconds.
    """

    addresses: tuple[str, ...]
    authority: x509.Certificate
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    expires: int

    def text(self) -> str:
        """The invitation as it is handed on; whoever has it can join, so it is a secret."""
        fields = (
            ",".join(self.addresses).encode(),
            self.authority.public_bytes(Encoding.DER),
            self.certificate.public_bytes(Encoding.DER),
            self.key.private_numbers().private_value.to_bytes(_KEY_BYTES),
            _EXPIRES.pack(self.expires),
        )
        content = b"".join(_LENGTH.pack(len(each)) + each for each in fields)
        content += hashlib.sha256(content).digest()[:_CHECKSUM_BYTES]
        return PREFIX + base64.urlsafe_b64encode(_LENGTH.pack(len(content)) + content).decode().rstrip("=")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For the channel over which the device joins."""
        import grpc

        return grpc.ssl_channel_credentials(
            pem_of_certificate(self.authority), pem_of_key(self.key), pem_of_certificate(self.certificate)
        )

    def end(self) -> str:
        """When it ends, to be read by a person."""
        return f"{datetime.fromtimestamp(self.expires, UTC):%Y-%m-%d %H:%M} UTC"


def make_invitation(
    home: Path, addresses: Sequence[str], *, valid_seconds: float = VALID_SECONDS
) -> Invitation:
    """An invitation for one device, entered in the table of them. This device must have founded the cluster.

    Args:
        addresses: HOST:PORT under which this device may be reached, likeliest first.

    Raises:
        RequestError: no address, too many, one that is none, or a time out of range.
        ForbiddenError: another device founded the cluster.
        OverloadedError: too many invitations are open.
        ConfigError: the cluster's files are damaged.
    """
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise RequestError(f"an invitation has 1 to {MAX_ADDRESSES} addresses, not {len(addresses)}")
    if not 0 < valid_seconds <= LONGEST_SECONDS:
        raise RequestError(
            f"an invitation is valid for up to {LONGEST_SECONDS / 86_400:g} days, not {valid_seconds:g} s"
        )
    for address in addresses:
        check_address(address)
    authority = open_authority(home)
    identifier = secrets.token_hex(_IDENTIFIER_BYTES)
    expires = int(time.time() + valid_seconds)
    key = new_key()
    certificate = authority.sign_invitation(key.public_key(), identifier, expires)
    Members(database_of(home)).invite(identifier, expires)
    return Invitation(tuple(addresses), authority.certificate, certificate, key, expires)


def parse_invitation(text: str) -> Invitation:
    """The invitation that a text is. Line breaks and spaces that a terminal put in do not matter.

    Raises:
        RequestError: it is none, incomplete, changed, or of another version.
    """
    compact = "".join(text.split())
    if not compact.startswith(PREFIX):
        if _OTHER_VERSION.match(compact):
            raise RequestError(
                "this invitation is of another version of edgert; use the same one on both devices"
            )
        raise RequestError(f"this is no invitation: it does not begin with {PREFIX}; {_AGAIN}")
    fields = _fields(_content(compact))
    if len(fields) != 5:
        raise RequestError(f"the invitation has {len(fields)} fields instead of 5; {_AGAIN}")
    addresses, authority, certificate, key, expires = fields
    try:
        if len(key) != _KEY_BYTES or len(expires) != _EXPIRES.size:
            raise ValueError("a field of the wrong length")
        names = tuple(map(check_address, addresses.decode("ascii").split(",")))
        if len(names) > MAX_ADDRESSES:
            raise ValueError(f"{len(names)} addresses")
        (ends,) = _EXPIRES.unpack(expires)
        datetime.fromtimestamp(ends, UTC)
        return Invitation(
            names,
            x509.load_der_x509_certificate(authority),
            x509.load_der_x509_certificate(certificate),
            ec.derive_private_key(int.from_bytes(key), ec.SECP256R1()),
            ends,
        )
    except (ValueError, OverflowError, OSError) as error:  # RequestError is a ValueError too
        raise RequestError(f"the invitation holds what none of ours does ({error}); {_AGAIN}") from error


def _content(compact: str) -> bytes:
    """What lies between prefix and checksum."""
    body = compact[len(PREFIX) :]
    if len(body) > MAX_CHARACTERS:
        raise RequestError(
            f"the invitation has {len(body)} characters; possible are {MAX_CHARACTERS}; {_AGAIN}"
        )
    # A lone last character holds no whole byte; it is the mark of a paste that was cut.
    whole = body[: len(body) - 1] if len(body) % 4 == 1 else body
    if not _BASE64.fullmatch(whole):
        raise RequestError(f"the invitation has characters that none has; {_AGAIN}")
    raw = base64.urlsafe_b64decode(whole + "=" * (-len(whole) % 4))
    wanted = _LENGTH.size + (_LENGTH.unpack_from(raw)[0] if len(raw) >= _LENGTH.size else 1)
    if len(raw) < wanted:
        raise RequestError(f"the invitation is cut off: {len(raw)} of {wanted} bytes are there; {_AGAIN}")
    if len(raw) > wanted:
        raise RequestError(f"something was added to the invitation: {len(raw)} bytes, not {wanted}; {_AGAIN}")
    content, checksum = raw[_LENGTH.size : -_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest()[:_CHECKSUM_BYTES] != checksum:
        raise RequestError(f"the invitation was changed on its way: its checksum differs; {_AGAIN}")
    return content


def _fields(content: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(content):
        if at + _LENGTH.size > len(content):
            raise RequestError(f"the invitation ends within a field; {_AGAIN}")
        (length,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size
        if at + length > len(content):
            raise RequestError(f"the invitation ends within a field; {_AGAIN}")
        found.append(content[at : at + length])
        at += length
    return found
