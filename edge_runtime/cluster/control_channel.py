"""Channels to a member's Cluster service: their credentials, their options, and what their failures mean."""

from __future__ import annotations

from typing import Any

import grpc

from edge_runtime.cluster.control_checks import MAX_MESSAGE_BYTES
from edge_runtime.cluster.identity import ANY_MEMBER, Identity, server_name
from edge_runtime.error_catalog import told_error
from edge_runtime.errors import (
    DeadlineError,
    EdgeRuntimeError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnauthenticatedError,
    UnavailableError,
)


def options(target: str) -> list[tuple[str, Any]]:
    """Of a channel to the server whose certificate carries the name ``target``."""
    return [
        ("grpc.ssl_target_name_override", target),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),  # members are in this network
        ("grpc.use_local_subchannel_pool", 1),  # closing a channel closes its connection
        # A member that was started again is found within seconds instead of minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # that an attempt may take: a lost SYN costs 1 s
        ("grpc.max_reconnect_backoff_ms", 3_000),
        # A member whose device lost power without a word is given up within 20 s.
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]


def open_channel(identity: Identity, address: str, name: str | None = None) -> grpc.aio.Channel:
    """A channel for an event loop.

    Args:
        name: of the member that must answer; None for any.
    """
    target = ANY_MEMBER if name is None else server_name(name)
    return grpc.aio.secure_channel(address, identity.channel_credentials(), options(target))


def open_sync_channel(identity: Identity, address: str, name: str | None = None) -> grpc.Channel:
    """A channel for threads; the same otherwise as :func:`open_channel`."""
    target = ANY_MEMBER if name is None else server_name(name)
    return grpc.secure_channel(address, identity.channel_credentials(), options(target))


def failure(error: Any, address: str) -> EdgeRuntimeError:
    """What a failed call means.

    Args:
        error: ``grpc.RpcError`` or ``grpc.aio.AioRpcError``.
        address: of the member, for the message.
    """
    details = error.details() or ""
    told = told_error(tuple(error.trailing_metadata() or ()), details)
    if told is not None:
        return told
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(details, address)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError(f"{address} did not answer in time")
        case grpc.StatusCode.CANCELLED:
            return UnavailableError(f"the call to {address} was cancelled")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return RequestError(f"the message to or from {address} is too large ({details})")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(f"{address} has too many calls at once; try again", 1.0)
        case grpc.StatusCode.UNIMPLEMENTED:
            return UnavailableError(f"{address} knows no such method; is it `edgert serve` of this version?")
        case grpc.StatusCode.UNAUTHENTICATED:
            return UnauthenticatedError(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return ForbiddenError(details)
    return EdgeRuntimeError(f"{address} answered {error.code().name}: {details}")


def _unavailable(details: str, address: str) -> UnavailableError:
    lower = details.lower()
    # Order matters: a refused connection's text mentions the handshake's layers as well.
    if "connection refused" in lower:
        return UnavailableError(f"nothing listens at {address}; is the daemon there running?")
    if any(word in lower for word in ("certificate", "ssl_error", "handshake", "verification")):
        return UnavailableError(
            f"{address} and this device do not accept each other's certificates: another cluster's device, "
            f"another member than expected, or a wrong clock ({details})"
        )
    if "resolution" in lower or "resolve" in lower:
        return UnavailableError(f"{address}: no device of that name is known; check the address")
    return UnavailableError(f"{address} cannot be reached ({details})")
