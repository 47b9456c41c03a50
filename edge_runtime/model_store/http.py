"""One HTTP request with this project's rules: encrypted, certificates checked, redirects looked at."""

from __future__ import annotations

import os
import re
import urllib.request
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from edge_runtime import __version__
from edge_runtime.errors import DownloadError
from edge_runtime.model_store.source import DEFAULT_HUB, check_address, is_loopback

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class Answer:
    """A server's answer, body unread.

    Attributes:
        status: HTTP status after all redirects.
        headers: of the last answer.
        body: readable, to be closed.
        linked_sha256: the SHA-256 that a model hub names for the file, where it does.
    """

    status: int
    headers: HTTPMessage
    body: Any
    linked_sha256: str | None


class _LookedAtRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 8

    def __init__(self) -> None:
        self.linked_sha256: str | None = None

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            check_address(newurl, origin=req.full_url)
        except DownloadError:
            fp.close()
            raise
        self.linked_sha256 = self.linked_sha256 or linked_sha256(headers)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


def linked_sha256(headers: HTTPMessage) -> str | None:
    """The file's SHA-256 as a model hub states it: its etag for large files is that hash."""
    value = (headers.get("x-linked-etag") or "").strip().removeprefix("W/").strip('"').lower()
    return value if _SHA256.fullmatch(value) else None


def get(url: str, headers: dict[str, str], timeout: float) -> Answer:
    """Request an address; every status is an answer, none raises.

    Raises:
        DownloadError: an address or a redirect that is not allowed.
        OSError, http.client.HTTPException: no answer came.
    """
    check_address(url)
    host = urlsplit(url).hostname or ""
    redirects = _LookedAtRedirects()
    opener = urllib.request.OpenerDirector()
    for handler in (
        # A proxy is for the network outside; asking it for this machine would reach another one.
        urllib.request.ProxyHandler({} if is_loopback(host) else None),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        redirects,
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={**_own_headers(url), **headers})
    try:
        response = opener.open(request, timeout=timeout)
    except HTTPError as error:
        response = error
    stated = redirects.linked_sha256 or linked_sha256(response.headers)
    return Answer(response.status or 0, response.headers, response, stated)


def _own_headers(url: str) -> dict[str, str]:
    # identity: a length and a range of the file itself, not of a compressed form of it
    headers = {"User-Agent": f"edge-runtime/{__version__}", "Accept-Encoding": "identity"}
    token = os.environ.get("HF_TOKEN")
    hub = os.environ.get("EDGERT_HUB", DEFAULT_HUB)
    if token and urlsplit(url).netloc == urlsplit(hub).netloc:
        headers["Authorization"] = f"Bearer {token}"
    return headers
