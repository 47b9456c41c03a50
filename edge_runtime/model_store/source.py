"""What ``models pull`` accepts: ``hf:owner/repo/file.gguf[@revision]`` or a web address."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from edge_runtime.errors import DownloadError, RequestError

DEFAULT_HUB = "https://huggingface.co"
_SPLIT_FILE = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_REPOSITORY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        text: what to show and record: the ``hf:`` form, or the address without its query, which may hold
            a secret.
        url: what to request.
        file_name: last part of the path, ending in ``.gguf``.
    """

    text: str
    url: str
    file_name: str


def parse_source(text: str) -> Source:
    """Read a source as the user wrote it.

    Raises:
        RequestError: neither form, or a file that cannot be a model.
    """
    if text.startswith("hf:"):
        return _parse_hub(text)
    if "://" not in text:
        raise RequestError(f"{text!r} is no model source; give hf:owner/repo/file.gguf or an https address")
    try:
        check_address(text)
    except DownloadError as error:
        raise RequestError(str(error)) from error
    parts = urlsplit(text)
    shown = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return Source(shown, text.partition("#")[0], _checked_file_name(unquote(parts.path), text=shown))


def _parse_hub(text: str) -> Source:
    location, revision = text.removeprefix("hf:"), "main"
    head, mark, tail = location.rpartition("@")
    if mark and head.lower().endswith(".gguf"):
        location, revision = head, tail
    owner, _, rest = location.partition("/")
    repository, _, path = rest.partition("/")
    segments = path.split("/")
    well_formed = all(_REPOSITORY_PART.fullmatch(part) for part in (owner, repository))
    if not well_formed or any(part in ("", ".", "..") for part in [*segments, *revision.split("/")]):
        raise RequestError(f"{text!r} is no hub source; the form is hf:owner/repo/file.gguf[@revision]")
    hub = os.environ.get("EDGERT_HUB", DEFAULT_HUB).rstrip("/")
    try:
        check_address(hub)
    except DownloadError as error:
        raise RequestError(f"EDGERT_HUB: {error}") from error
    url = f"{hub}/{owner}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
    return Source(text, url, _checked_file_name(path, text=text))


def _checked_file_name(path: str, *, text: str) -> str:
    name = path.rsplit("/", 1)[-1]
    if not name.lower().endswith(".gguf"):
        raise RequestError(f"{text!r} does not end in .gguf; the engine reads GGUF files only")
    if _SPLIT_FILE.search(name):
        raise RequestError(
            f"{name!r} is one part of a split model; the engine reads single files: "
            "choose a single-file version, or join the parts with llama.cpp's llama-gguf-split --merge"
        )
    return name


def check_address(url: str, *, origin: str | None = None) -> None:
    """Refuse an address that is not encrypted, except on this machine itself.

    Args:
        origin: the address that redirected here; from https only https may follow.

    Raises:
        DownloadError: not https, not loopback, or with a user name in it.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"{url!r} is no web address: {error}") from error
    if not host or parts.scheme not in ("http", "https"):
        raise DownloadError(f"{_without_query(url)!r} is no https address")
    if parts.username is not None or parts.password is not None:
        raise DownloadError(f"the address of {host} holds a user name or a password; give it without")
    if parts.scheme == "http" and origin is not None and urlsplit(origin).scheme == "https":
        raise DownloadError(f"{urlsplit(origin).hostname} redirects from https to http ({host}); refused")
    if parts.scheme == "http" and not is_loopback(host):
        raise DownloadError(f"http://{host} is not encrypted; use https")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_query(url: str) -> str:
    return url.partition("?")[0]
