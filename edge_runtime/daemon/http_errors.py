"""What the HTTP API answers to an error: a status, headers and the body that OpenAI's clients expect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.error_catalog import INTERNAL, answer_to
from edge_runtime.errors import OverloadedError, RequestError, UnauthenticatedError, UnavailableError

_STOPPING_RETRY_SECONDS = 5  # a service manager starts the daemon anew within a few seconds


class ParameterError(Exception):
    """A request's parameter has the wrong type, is out of range, or is not supported.

    Attributes:
        param: its name as the client wrote it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class HttpError(Exception):
    """A request that HTTP itself has a status for.

    Attributes:
        status, code: of the answer.
        headers: further ones.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that says what went wrong.

    Attributes:
        status: of HTTP.
        body: ``{"error": {"message", "type", "param", "code"}}``.
        headers: those that belong to the status.
        expected: False for an error that nobody foresaw, which belongs into the log.
    """

    status: int
    body: dict[str, dict[str, str | None]]
    headers: dict[str, str] = field(default_factory=dict)
    expected: bool = True


def refusal_of(error: Exception) -> Refusal:
    """The answer to an error. Nothing internal is in it."""
    if isinstance(error, HttpError):
        body = _body(str(error), "invalid_request_error", error.code)
        return Refusal(error.status, body, error.headers)
    param: str | None = None
    known: Exception = error
    if isinstance(error, ParameterError):
        param, known = error.param, RequestError(str(error))
    answer, code, message = answer_to(known)
    return Refusal(
        answer.http,
        _body(message, answer.openai_type, code, param),
        _headers(known),
        expected=answer is not INTERNAL,
    )


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        return {"retry-after": str(_seconds(error.retry_after))}
    if isinstance(error, UnavailableError):
        return {"retry-after": str(_STOPPING_RETRY_SECONDS)}
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": "Bearer"}
    return {}


def _seconds(delay: float) -> int:
    """Whole seconds of at least 1: Retry-After knows no fractions, and 0 would mean a busy loop."""
    return max(1, math.ceil(delay)) if math.isfinite(delay) else 60


def _body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
