"""gRPC's errors to this project's."""

from __future__ import annotations

from typing import Any

import grpc

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


def failure(error: Any, address: str) -> EdgeRuntimeError:
    """What a failed call means.

    Args:
        error: ``grpc.RpcError`` or ``grpc.aio.AioRpcError``.
        address: of the daemon, for the message.
    """
    details = error.details() or ""
    told = told_error(tuple(error.trailing_metadata() or ()), details)
    if told is not None:
        return told
    return _without_code(error.code(), details, address)


def _without_code(status: grpc.StatusCode, details: str, address: str) -> EdgeRuntimeError:
    """An error that gRPC itself raised, here or there."""
    match status:
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(details, address)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError("the time given to the call is over; allow more with timeout=")
        case grpc.StatusCode.CANCELLED:
            return UnavailableError(f"the call to {address} was cancelled; the daemon may be stopping")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return RequestError(
                f"the message is too large for the daemon's server.max_body_bytes ({details})"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(f"{address} has too many calls at once; try again", 1.0)
        case grpc.StatusCode.UNIMPLEMENTED:
            return UnavailableError(
                f"{address} answers but knows no such method; is it `edgert serve` of this version?"
            )
        case grpc.StatusCode.UNAUTHENTICATED:
            return UnauthenticatedError(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return ForbiddenError(details)
    return EdgeRuntimeError(f"{address} answered {status.name}: {details}")


def _unavailable(details: str, address: str) -> UnavailableError:
    lower = details.lower()
    if "handshake" in lower or "certificate" in lower or "ssl" in lower:
        return UnavailableError(
            f"{address} and this client do not agree on TLS: pass ca= with the daemon's ca.pem, or none "
            f"where it has no TLS ({details})"
        )
    if "failed to connect" in lower or "connection refused" in lower or "no such file" in lower:
        return UnavailableError(f"no daemon answers at {address}; start one with `edgert serve`")
    if "resolution" in lower or "resolve" in lower:
        return UnavailableError(f"{address}: no device of that name is known; check the address")
    return UnavailableError(f"the connection to {address} broke; try again ({details})")
