"""How a device comes into a cluster, and out of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from edge_runtime.cluster.control_channel import failure, options
from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.identity import (
    FOUNDER,
    MEMBER_KEY,
    Identity,
    check_name,
    database_of,
    folder_of,
    forget_identity,
    identity_of,
    keep_identity,
    read_identity,
)
from edge_runtime.cluster.invitation import Invitation, parse_invitation
from edge_runtime.cluster.members import Members
from edge_runtime.errors import (
    DeadlineError,
    EdgeRuntimeError,
    ForbiddenError,
    RequestError,
    UnavailableError,
)
from edge_runtime.model_store.files import exclusive
from edge_runtime.private_authority import new_key, pem_of_key, read_key, sensible_now
from edge_runtime.private_files import make_file, write_file
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

JOIN_SECONDS = 8.0  # for each of the invitation's addresses


async def join(home: Path, text: str, name: str, address: str) -> Identity:
    """Become a member with an invitation. After a failure the same text may be tried again.

    Args:
        text: of the invitation.
        name: that this device would like; where it is taken, it gets a number behind it.
        address: HOST:PORT of this device's Cluster service; a host of 0.0.0.0 stands for the address that
            the inviting device sees.

    Raises:
        RequestError: the text is no invitation, the name or the address cannot be one, or this device is a
            member already.
        UnauthenticatedError: the invitation is unknown, used or expired.
        UnavailableError: the inviting device cannot be reached.
        ConfigError: the clock is wrong, or files are damaged.
    """
    invitation = parse_invitation(text)
    check_name(name)
    sensible_now()
    with _alone(home):
        found = read_identity(home)
        if found is not None:
            raise RequestError(f"this device is in a cluster already, as {found.name}; leave it first")
        key = _kept_key(home)
        response = await _ask(invitation, _request(key, name, address))
        return _enter(home, invitation, key, response)


async def leave(home: Path, *, force: bool = False) -> Identity | None:
    """Leave the cluster; returns who this device was there.

    Args:
        force: forget the cluster here even where the founder cannot be told, or is this device.

    Raises:
        RequestError: this device is in no cluster.
        ForbiddenError: it founded the cluster, and others are in it.
        UnavailableError, DeadlineError: the founder cannot be reached.
    """
    try:
        identity = read_identity(home)
    except EdgeRuntimeError:
        if not force:
            raise
        forget_identity(home)
        return None
    if identity is None and not force:
        raise RequestError("this device is in no cluster")
    if identity is not None and not force:
        await _tell(home, identity)
    forget_identity(home)
    return identity


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    lock = folder_of(home) / "cluster.lock"
    make_file(lock)
    try:
        with exclusive(lock, wait=False):
            yield
    except BlockingIOError as error:
        raise RequestError(
            "another edgert founds or joins a cluster here at this moment; wait for it"
        ) from error


async def _tell(home: Path, identity: Identity) -> None:
    members = Members(database_of(home))
    if identity.is_founder:
        others = [member.name for member in members.active() if member.name != identity.name]
        if others:
            raise ForbiddenError(
                f"this device founded the cluster, and {', '.join(others[:8])} could take nobody in without "
                "it; let them leave first, or add --force"
            )
        return
    founder = members.founder()
    if founder is None:
        raise UnavailableError("this device does not know the founder of its cluster; add --force")
    async with ControlClient(identity, founder.address, founder.name) as client:
        try:
            await client.leave()
        except (UnavailableError, DeadlineError) as error:
            raise type(error)(
                f"{founder.name} founded the cluster and cannot be told (`edgert cluster leave --force` "
                f"leaves all the same): {error}"
            ) from error
        except ForbiddenError:
            pass  # it was taken out already


def _kept_key(home: Path) -> ec.EllipticCurvePrivateKey:
    """This device's key: of a joining that was cut short, so that its invitation still serves; else new."""
    path = folder_of(home) / MEMBER_KEY
    if path.exists():
        return read_key(path)
    key = new_key()
    write_file(path, pem_of_key(key), 0o600)
    return key


def _request(key: ec.EllipticCurvePrivateKey, name: str, address: str) -> wire.JoinRequest:
    signing_request = (
        x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    )
    return wire.JoinRequest(
        name=name, signing_request=signing_request.public_bytes(Encoding.DER), address=address
    )


async def _ask(invitation: Invitation, request: wire.JoinRequest) -> wire.JoinResponse:
    """Try the addresses in turn; one that answers decides, whatever it says."""
    unreached = []
    for address in invitation.addresses:
        # The founder's own name: another member could not pass for it.
        channel = grpc.aio.secure_channel(address, invitation.channel_credentials(), options(FOUNDER))
        try:
            stub: Any = cluster_pb2_grpc.ClusterStub(channel)
            response: wire.JoinResponse = await stub.Join(request, timeout=JOIN_SECONDS)
            return response
        except grpc.aio.AioRpcError as error:
            told = failure(error, address)
            if not isinstance(told, UnavailableError | DeadlineError):
                raise told from error
            unreached.append(str(told))
        finally:
            await channel.close()
    ended = f"; the invitation ended at {invitation.end()}" if time.time() > invitation.expires else ""
    raise UnavailableError(f"the inviting device cannot be reached: {'; '.join(unreached)}{ended}")


def _enter(
    home: Path,
    invitation: Invitation,
    key: ec.EllipticCurvePrivateKey,
    response: wire.JoinResponse,
) -> Identity:
    try:
        certificate = x509.load_pem_x509_certificate(response.certificate)
    except ValueError as error:
        raise RequestError(
            "the inviting device answered without a certificate; is it of this version?"
        ) from error
    identity = identity_of(certificate, key, invitation.authority)
    if certificate.public_key() != key.public_key() or identity.name != response.name:
        raise RequestError("the inviting device answered with another device's certificate; try again")
    listed = [(member.name, member.address) for member in response.members]
    if not listed:
        raise RequestError("the inviting device did not say who it is; is it of this version?")
    if identity.name not in dict(listed):
        raise RequestError("the inviting device did not list this one; is it of this version?")
    Members(database_of(home)).learn(listed[0][0], listed)
    keep_identity(home, identity)
    return identity
