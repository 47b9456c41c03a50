"""Error code -> what each API answers. One table for gRPC, HTTP and the client, which reads it backwards."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from edge_runtime import errors

CODE_KEY = "edgert-code"  # in a failed gRPC call's trailing metadata
RETRY_KEY = "retry-after-ms"


class Answer(NamedTuple):
    """How an error looks from outside.

    Attributes:
        grpc: name of the ``grpc.StatusCode``.
        http: status.
        openai_type: the ``type`` that OpenAI's clients expect in an error body.
        public: whether the message may go to the client; otherwise it goes to the log alone.
    """

    grpc: str
    http: int
    openai_type: str
    public: bool = True


CATALOG: dict[type[errors.EdgeRuntimeError], Answer] = {
    errors.ModelFileError: Answer("FAILED_PRECONDITION", 422, "invalid_request_error"),
    errors.UnsupportedModelError: Answer("FAILED_PRECONDITION", 422, "invalid_request_error"),
    errors.ModelNotFoundError: Answer("NOT_FOUND", 404, "invalid_request_error"),
    errors.AdapterFileError: Answer("FAILED_PRECONDITION", 422, "invalid_request_error"),
    errors.AdapterNotFoundError: Answer("NOT_FOUND", 404, "invalid_request_error"),
    errors.DownloadError: Answer("UNAVAILABLE", 502, "server_error"),
    errors.RequestError: Answer("INVALID_ARGUMENT", 400, "invalid_request_error"),
    errors.ContextOverflowError: Answer("INVALID_ARGUMENT", 400, "invalid_request_error"),
    errors.ChatTemplateError: Answer("INVALID_ARGUMENT", 400, "invalid_request_error"),
    errors.OutOfMemoryError: Answer("RESOURCE_EXHAUSTED", 507, "server_error"),
    errors.DependencyError: Answer("FAILED_PRECONDITION", 501, "server_error"),
    errors.ConfigError: Answer("FAILED_PRECONDITION", 500, "server_error"),
    errors.OverloadedError: Answer("RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
    errors.DeadlineError: Answer("DEADLINE_EXCEEDED", 504, "server_error"),
    errors.UnavailableError: Answer("UNAVAILABLE", 503, "server_error"),
    errors.UnauthenticatedError: Answer("UNAUTHENTICATED", 401, "authentication_error"),
    errors.ForbiddenError: Answer("PERMISSION_DENIED", 403, "permission_error"),
}
INTERNAL = Answer("INTERNAL", 500, "server_error", public=False)
INTERNAL_MESSAGE = "an internal error; the daemon's log says more"


def answer_to(error: BaseException) -> tuple[Answer, str, str]:
    """What to answer: how, the code and the message. Nothing internal is in them."""
    known = CATALOG.get(type(error)) if isinstance(error, errors.EdgeRuntimeError) else None
    if known is None or not isinstance(error, errors.EdgeRuntimeError):
        return INTERNAL, errors.EdgeRuntimeError.code, INTERNAL_MESSAGE
    return known, error.code, str(error) if known.public else INTERNAL_MESSAGE


def error_of(code: str, message: str, retry_after: float = 1.0) -> errors.EdgeRuntimeError:
    """The error that a daemon's answer stands for."""
    for kind in CATALOG:
        if kind.code == code:
            return kind(message, retry_after) if kind is errors.OverloadedError else kind(message)
    return errors.EdgeRuntimeError(message)


def told_error(metadata: Iterable[tuple[str, Any]], details: str) -> errors.EdgeRuntimeError | None:
    """The error that one of our servers told in a failed gRPC call; None if gRPC itself failed.

    Args:
        metadata: the call's trailing metadata.
        details: its message.
    """
    found = dict(metadata)
    code = found.get(CODE_KEY)
    if code is None:
        return None
    retry_after = 1.0
    with suppress(ValueError):
        retry_after = int(found.get(RETRY_KEY, "1000")) / 1000
    return error_of(code, details, retry_after)
