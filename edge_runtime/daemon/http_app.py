"""The HTTP application: which path is answered by what."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_runtime.daemon.auth import Gate
from edge_runtime.daemon.edits_api import EditsApi
from edge_runtime.daemon.http_boundary import Boundary
from edge_runtime.daemon.http_errors import HttpError
from edge_runtime.daemon.openai_api import OpenAIApi
from edge_runtime.daemon.operations_api import OperationsApi
from edge_runtime.daemon.service import Service

_CODES = {404: "not_found", 405: "method_not_allowed"}


def build_app(service: Service, gate: Gate) -> Starlette:
    """The application of one daemon.

    Args:
        service: what answers; started before the first request.
        gate: who may ask what.
    """
    openai = OpenAIApi(service, gate)
    edits = EditsApi(service, gate)
    operations = OperationsApi(service, gate)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
            Route("/v1/completions", openai.completions, methods=["POST"]),
            Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
            Route("/v1/models", openai.models, methods=["GET"]),
            Route("/v1/models/{name:path}", openai.model, methods=["GET"]),
            Route("/v1/edits", edits.edits, methods=["GET"]),
            Route("/v1/edits", edits.apply, methods=["POST"]),
            Route("/v1/edits/{name}", edits.edit, methods=["GET"]),
            Route("/v1/edits/{name}", edits.remove, methods=["DELETE"]),
            Route("/v1/edits/{name}/apply", edits.reapply, methods=["POST"]),
            Route("/v1/edits/{name}/revert", edits.revert, methods=["POST"]),
            Route("/v1/edits/{name}/cancel", edits.cancel, methods=["POST"]),
            Route("/healthz", operations.healthz, methods=["GET"]),
            Route("/readyz", operations.readyz, methods=["GET"]),
            Route("/metrics", operations.metrics, methods=["GET"]),
            Route("/api/status", operations.status, methods=["GET"]),
            Route("/", operations.page, methods=["GET"]),
        ],
        middleware=[Middleware(Boundary)],
        exception_handlers={HTTPException: _unrouted},
    )
    app.router.redirect_slashes = False  # such a redirect would repeat whatever Host the client claimed
    return app


async def _unrouted(request: Request, error: Exception) -> Response:
    """What no route takes becomes an error like all others."""
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    message = "there is nothing at this path; /v1/models, /v1/chat/completions and others are"
    if error.status_code == 405:
        message = f"this path does not take {request.method[:16]}"
    raise HttpError(error.status_code, code, message, error.headers)
