"""Where HTTP requests come in: who may ask, how large a body may be, what errors look like from outside."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.daemon import auth
from edge_runtime.daemon.http_errors import ClientGoneError, HttpError, refusal_of
from edge_runtime.daemon.json_fields import parse_object
from edge_runtime.daemon.json_response import json_response
from edge_runtime.errors import ForbiddenError, UnauthenticatedError

_log = logging.getLogger("edgert.http")

# Nothing here is to be embedded, sniffed, cached or read by another site. The page adds its own policy.
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NOT_CACHED = (b"cache-control", b"no-store")
_READING = ("GET", "HEAD")
_OWN_SITE = ("same-origin", "none")  # values of Sec-Fetch-Site; none: typed by the user


class Boundary:
    """Middleware around everything: refuses what a browser was tricked into, and words every error.

    Args:
        app: what answers the requests that pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.monotonic()
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message)
            await send(message)

        try:
            _check_host(scope)
            _check_origin(scope)
            await self._app(scope, receive, send_guarded)
        except ClientGoneError:
            _log.debug("the client went away", extra={"path": _shown_path(scope)})
        except Exception as error:
            refusal = refusal_of(error)
            if not refusal.expected:
                _log.error("a request failed", exc_info=error, extra={"path": _shown_path(scope)})
            if not status:  # otherwise the connection is closed in the middle, which every client notices
                response = json_response(refusal.body, refusal.status, refusal.headers)
                await response(scope, receive, send_guarded)
        if _log.isEnabledFor(logging.DEBUG):
            seconds = time.monotonic() - began
            _log.debug("%s %s: %d in %.3f s", scope["method"][:16], _shown_path(scope), status, seconds)


def identify(request: Request, gate: auth.Gate, needed: auth.Scope) -> auth.Identity:
    """Who asks, if they may.

    Raises:
        UnauthenticatedError, ForbiddenError, OverloadedError: they may not.
    """
    headers = request.headers.getlist("authorization")
    if len(headers) > 1:
        raise UnauthenticatedError(f"{len(headers)} authorization headers; send one")
    token = auth.bearer_token(headers[0] if headers else None)
    return gate.admit(token, address_of(request), needed)


def address_of(request: Request) -> str:
    """The caller's IP address, from the socket; headers could claim anything."""
    return request.client.host if request.client else ""


def client_of(request: Request, identity: auth.Identity) -> str:
    """Between whom the queue is fair."""
    return address_of(request) if identity.name == auth.LOCAL else identity.name


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The JSON object that a request carries.

    Args:
        most: bytes that a body may have.

    Raises:
        HttpError: too large, of two lengths, or not declared as JSON. RequestError: no JSON object.
        ClientGoneError: the connection was closed before the end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "unsupported_media_type", "the body needs Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise HttpError(415, "unsupported_media_type", "the body is compressed; send it as it is")
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        # Two readers of it could disagree on where the next request begins.
        close = {"connection": "close"}
        raise HttpError(400, "invalid_request", "a body is either chunked or has a length, not both", close)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > most:  # a chunked body declares nothing
            raise _too_large(most)
        if not message.get("more_body", False):
            return parse_object(bytes(body))


def _too_large(most: int) -> HttpError:
    return HttpError(
        413,
        "too_large",
        f"the body is larger than {most} bytes; send less, or raise server.max_body_bytes in the settings",
    )


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs inside as soon as the client closes its connection.

    The request's body must have been read.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.current_task()
    assert task is not None, "a request is handled by a task"
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # The daemon's own end may cancel the task as well, which then is to be seen further out.
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        # Where the watcher cancelled the task, the error came out of the await inside; none is left over.
        watcher.cancel()


def _add_headers(message: Message) -> None:
    headers: list[tuple[bytes, bytes]] = list(message.get("headers", []))
    names = {name for name, _ in headers}
    headers += _SECURITY_HEADERS
    headers += [item for item in (_POLICY, _NOT_CACHED) if item[0] not in names]
    headers.append((b"date", formatdate(usegmt=True).encode()))
    message["headers"] = headers


def _check_host(scope: Scope) -> None:
    """On loopback, refuse names that are not this device's.

    A foreign page could let its own name point to 127.0.0.1 and would then be of one origin with the daemon.
    Its requests still carry its name. Beyond loopback a token is needed, which such a page does not have.
    """
    server = scope.get("server")
    if server is None or not _is_loopback(server[0]):
        return
    for host in Headers(scope=scope).getlist("host"):
        name = _host_name(host)
        if name not in ("localhost", "localhost.") and not _is_loopback(name):
            raise ForbiddenError(
                "the Host header names another machine; on loopback ask for localhost, 127.0.0.1 or [::1]"
            )


def _check_origin(scope: Scope) -> None:
    """Refuse what another site's page makes a browser send."""
    if scope["method"] in _READING:
        return  # without CORS headers a foreign page cannot read the answer, and reading changes nothing
    headers = Headers(scope=scope)
    own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}".lower()
    foreign = any(origin.lower() != own for origin in headers.getlist("origin"))
    if foreign or headers.get("sec-fetch-site", "none") not in _OWN_SITE:
        raise ForbiddenError("a page of another origin may not send requests here")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; empty where there is none that can be read."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _shown_path(scope: Scope) -> str:
    """A path for the log, in one short line, without its query."""
    return ascii(scope["path"][:80])[1:-1]
