"""Fetch one file over a connection that may break, so that nothing that already arrived is fetched again.

A break is answered by a Range request for the rest, bound to the same version of the file by If-Range and
the ETag. A server without ranges, or whose file has changed, makes the download start again. What arrives is
checked as it arrives: it must begin like a GGUF file, keep within the stated length, and at the end have the
SHA-256 that the caller or the hub names.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from edge_runtime.errors import DownloadError
from edge_runtime.model_store import http as web
from edge_runtime.model_store.files import CHUNK, Progress, feed, no_progress
from edge_runtime.model_store.partial import Partial
from edge_runtime.model_store.source import Source

_MAGIC = b"GGUF"
_DISK_MARGIN = 64 << 20  # left free, so that the rest of the system goes on working
_RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_CONTENT_RANGE_STATUS = 416


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to try, and how much to take.

    Attributes:
        maximum_bytes: a larger file is refused.
        timeout_seconds: without a byte for so long, a connection counts as broken.
        attempts: tries in a row that bring less than ``fruitful_bytes`` before giving up.
        first_attempts: the same, while the server has never answered: a wrong name should fail soon.
        first_pause_seconds, longest_pause_seconds: waits between tries double from one to the other.
    """

    maximum_bytes: int = 1 << 40
    timeout_seconds: float = 30.0
    attempts: int = 8
    first_attempts: int = 2
    fruitful_bytes: int = 256 << 10
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Download:
    """A whole file, on disk and synced. Move it away while the lock on its key is held."""

    path: Path
    size: int
    sha256: str


class _Interrupted(Exception):  # noqa: N818 - not an error: the next try may succeed
    """This try brought no whole file, for a reason that may pass."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


def key_of(source: Source) -> str:
    """Names a download among others: the same address has the same key."""
    return f"{hashlib.sha256(source.url.encode()).hexdigest()[:12]}-{source.file_name}"


def download(
    source: Source,
    folder: Path,
    *,
    sha256: str | None = None,
    limits: Limits | None = None,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda text: None,
) -> Download:
    """Fetch a file, going on where an earlier call stopped.

    Args:
        folder: of downloads that have begun; the caller holds a lock on ``key_of(source)``.
        sha256: what the file must hash to, 64 hexadecimal digits.
        notice: called with a line whenever something goes wrong that is tried again.

    Raises:
        DownloadError: with what to do about it. What arrived is kept, unless it is known to be wrong.
    """
    try:
        partial = Partial(folder, key_of(source))
    except OSError as error:
        raise DownloadError(f"cannot write to {folder}: {error.strerror}; check owner and disk") from error
    fetch = _Fetch(source, partial, (sha256 or "").lower(), limits or Limits(), progress, notice)
    try:
        return fetch.run()
    finally:
        partial.close()


class _Fetch:
    def __init__(
        self,
        source: Source,
        partial: Partial,
        sha256: str,
        limits: Limits,
        progress: Progress,
        notice: Callable[[str], None],
    ) -> None:
        self._source = source
        self._partial = partial
        self._sha256 = sha256
        self._limits = limits
        self._progress = progress
        self._notice = notice
        self._digest: Any = hashlib.sha256()
        self._answered = False

    def run(self) -> Download:
        partial = self._partial
        if partial.size:
            self._notice(f"going on after {partial.size / 1e6:.1f} MB from an earlier try")
            feed(self._digest, partial.path, lambda done, _: self._progress(done, partial.total))
        self._try_until_whole()
        found = self._digest.hexdigest()
        size = partial.size
        for wanted, by_whom in ((self._sha256, "--sha256"), (partial.sha256, "the hub")):
            if wanted and found != wanted:
                partial.discard()
                raise DownloadError(
                    f"{self._source.text}: sha256 is {found}, but {by_whom} says {wanted}; "
                    "the file was dropped: check the hash, or pull again"
                )
        return Download(partial.hand_over(), size, found)

    def _try_until_whole(self) -> None:
        limits = self._limits
        fruitless, best = 0, self._partial.size
        while True:
            try:
                self._attempt()
                return
            except _Interrupted as interruption:
                reason, pause = str(interruption), interruption.pause
            except (OSError, http.client.HTTPException) as error:
                reason, pause = self._explain(error), 0.0
            if self._partial.size >= best + limits.fruitful_bytes:
                fruitless, best = 0, self._partial.size
            fruitless += 1
            if fruitless >= (limits.attempts if self._answered else limits.first_attempts):
                raise DownloadError(f"{self._source.text}: {reason}; {self._how_to_go_on()}")
            pause = max(pause, limits.first_pause_seconds * 2 ** (fruitless - 1))
            pause = min(pause, limits.longest_pause_seconds)
            self._notice(f"{reason}; trying again in {pause:.1f} s")
            time.sleep(pause)

    def _how_to_go_on(self) -> str:
        if self._partial.size:
            return f"{self._partial.size / 1e6:.1f} MB are kept: run the same command to go on from there"
        return "check the connection and run the same command again"

    def _explain(self, error: Exception) -> str:
        """The reason for a broken try in plain words; raises at once where another try cannot help."""
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{self._source.text}: the server's certificate is not valid ({cause.verify_message}); "
                "check the address and this machine's clock"
            ) from error
        if isinstance(cause, socket.gaierror):
            return f"the server's name cannot be resolved ({cause.strerror})"
        if isinstance(cause, TimeoutError):
            return f"no byte arrived for {self._limits.timeout_seconds:g} s"
        if isinstance(cause, OSError):
            return f"connection failed ({cause.strerror or cause})"
        return f"connection failed ({cause!r})"

    def _attempt(self) -> None:
        headers = {}
        if self._partial.size and self._partial.etag:
            headers = {"Range": f"bytes={self._partial.size}-", "If-Range": self._partial.etag}
        answer = web.get(self._source.url, headers, self._limits.timeout_seconds)
        with answer.body:
            self._answered = True
            if self._begin(answer):
                self._receive(answer.body)

    def _begin(self, answer: web.Answer) -> bool:
        """Agree with the server on what follows; false where nothing is missing any more."""
        partial = self._partial
        if answer.status == _CONTENT_RANGE_STATUS and partial.size:
            _, total = _content_range(answer.headers.get("Content-Range", ""))
            if total == partial.size == (partial.total or total):
                return False
            self._restart()
            raise _Interrupted("the server's file has changed its length")
        if answer.status not in (200, 206):
            self._refuse(answer)
        etag = _strong(answer.headers.get("ETag", ""))
        start: int | None = 0
        total = _length(answer.headers.get("Content-Length", ""))
        if answer.status == 206:
            start, total = _content_range(answer.headers.get("Content-Range", ""))
            same_length = total is None or partial.total is None or total == partial.total
            if start != partial.size or etag not in ("", partial.etag) or not same_length:
                self._restart()
                raise _Interrupted("the server answered with another part or version than asked for")
        elif partial.size:
            self._notice("the server starts at the beginning: it keeps no ranges, or the file has changed")
            self._restart()
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise DownloadError(f"{self._source.text}: the server sends it {encoding}-encoded, unasked")
        partial.etag, partial.total = etag or partial.etag, total if total is not None else partial.total
        if start and answer.linked_sha256 not in (None, partial.sha256):
            self._restart()
            raise _Interrupted("the hub's file has changed")
        partial.sha256 = answer.linked_sha256 or (partial.sha256 if start else "")
        self._check_room()
        return True

    def _receive(self, body: Any) -> None:
        partial, total = self._partial, self._partial.total
        self._progress(partial.size, total)
        while total is None or partial.size < total:
            # read1 gives what has arrived: a bar that moves, and a break that loses nothing.
            chunk = body.read1(CHUNK if total is None else min(CHUNK, total - partial.size))
            if not chunk:
                break
            self._keep(chunk)
        if total is not None and partial.size < total:
            raise _Interrupted(f"the connection broke after {partial.size} of {total} bytes")
        if not partial.size:
            raise _Interrupted("the server sent an empty file")
        partial.total = partial.size

    def _keep(self, chunk: bytes) -> None:
        partial = self._partial
        if partial.size == 0 and not _MAGIC.startswith(chunk[:4]):
            raise DownloadError(
                f"{self._source.text} is not a GGUF file: it begins with {chunk[:4]!r}, not {_MAGIC!r}; "
                "check the address (a page about the file is not the file)"
            )
        if partial.total is None and (partial.size + len(chunk)) // (16 << 20) > partial.size // (16 << 20):
            self._check_room(len(chunk))
        try:
            partial.append(chunk)
        except OSError as error:
            raise DownloadError(
                f"cannot write {partial.path}: {error.strerror}; "
                "free some space and run the same command to go on"
            ) from error
        self._digest.update(chunk)
        self._progress(partial.size, partial.total)

    def _check_room(self, least: int = 0) -> None:
        partial, most = self._partial, self._limits.maximum_bytes
        size = partial.size + least if partial.total is None else partial.total
        if size > most:
            raise DownloadError(f"{self._source.text} has {size} bytes; at most {most} are taken")
        missing = size - partial.size
        free = shutil.disk_usage(partial.path.parent).free
        if missing + _DISK_MARGIN > free:
            raise DownloadError(
                f"{self._source.text} needs {missing / 1e6:.0f} MB more in {partial.path.parent}, "
                f"where {free / 1e6:.0f} MB are free; remove models (edgert models rm) "
                "or set EDGERT_HOME to a folder on a larger disk"
            )

    def _restart(self) -> None:
        self._partial.restart()
        self._digest = hashlib.sha256()

    def _refuse(self, answer: web.Answer) -> None:
        status, name = answer.status, self._source.text
        if status in _RETRIED_STATUSES:
            pause = _seconds(answer.headers.get("Retry-After", ""))
            raise _Interrupted(f"the server answered {status}", pause)
        if status in (401, 403):
            raise DownloadError(
                f"{name}: the server refuses access ({status}); if the model needs a licence to be accepted, "
                "accept it on the hub and set HF_TOKEN to a token of your account"
            )
        if status in (404, 410):
            raise DownloadError(f"{name}: there is no such file on the server ({status}); check the spelling")
        if 300 <= status < 400:
            raise DownloadError(f"{name}: the server redirects in a circle or to nowhere ({status})")
        raise DownloadError(f"{name}: the server answered {status}, neither the file nor a passing fault")


def _content_range(text: str) -> tuple[int | None, int | None]:
    """First byte and whole length that a Content-Range header states."""
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        return None, None
    first, _, total = match.groups()
    return None if first is None else int(first), None if total == "*" else int(total)


def _length(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _strong(etag: str) -> str:
    """An ETag that names exact bytes; weak ones cannot be used with ranges."""
    etag = etag.strip()
    return etag if etag.startswith('"') and etag.endswith('"') and len(etag) > 2 else ""
