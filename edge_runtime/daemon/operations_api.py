"""For those who run the daemon: is it alive, is it ready, how is it doing; and the status page."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from edge_runtime.daemon.auth import Gate, Identity, Scope
from edge_runtime.daemon.http_boundary import client_of, identify
from edge_runtime.daemon.http_errors import HttpError
from edge_runtime.daemon.json_response import json_response
from edge_runtime.daemon.service import Service

PAGE = Path(__file__).parent / "page" / "index.html"
_RETRY_SECONDS = "2"


class OperationsApi:
    """The handlers of these routes.

    Args:
        service: whose state they show.
        gate: who may see it.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate
        self._page: tuple[bytes, str] | None = None

    async def healthz(self, _: Request) -> Response:
        """``GET /healthz``: the process answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        """``GET /readyz``: 200 if a token was produced lately and requests are taken, else 503 and why."""
        if self._service.ready:
            return PlainTextResponse("ready\n")
        reason = self._service.status().reason or "not ready"
        return PlainTextResponse(f"{reason}\n", 503, {"retry-after": _RETRY_SECONDS})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``, for Prometheus."""
        identify(request, self._gate, Scope.INFER)
        body, content_type = self._service.metrics.render(self._service.status())
        return Response(body, headers={"content-type": content_type})

    async def status(self, request: Request) -> Response:
        """``GET /api/status``; whose others' requests are and where members are, administrators alone see."""
        identity = identify(request, self._gate, Scope.INFER)
        found = self._service.status()
        if Scope.ADMIN not in identity.scopes and found.cluster is not None:
            found = replace(found, cluster=found.cluster.without_addresses())
        status = found.as_json()
        if Scope.ADMIN not in identity.scopes:
            own = client_of(request, identity)
            status["requests"] = [
                one if one["client"] == own else one | {"id": "", "client": ""} for one in status["requests"]
            ]
        return json_response(status | {"scopes": _scopes(identity)})

    async def page(self, _: Request) -> Response:
        """``GET /``: the status page. It holds no data; what it shows, it asks for itself."""
        if self._page is None:
            try:
                html = PAGE.read_bytes()
            except OSError:
                raise HttpError(404, "not_found", "this installation has no status page") from None
            self._page = html, policy_of(html.decode("utf-8"))
        html, policy = self._page
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return Response(html, headers=headers, media_type="text/html")


def _scopes(identity: Identity) -> list[str]:
    return sorted(scope.value for scope in identity.scopes)


def policy_of(html: str) -> str:
    """A content security policy that allows a page its own script and style, by their hashes, and no more.

    Even if something foreign got into the page, it would not run and could not send anything elsewhere.
    """
    allowed = [
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(["default-src 'none'", *allowed])


def _hashes(html: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL | re.IGNORECASE)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
