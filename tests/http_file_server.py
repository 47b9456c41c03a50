"""An HTTP server on loopback that breaks in the ways a test asks for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ServedFile:
    """A file on the test server and how the server misbehaves with it.

    Attributes:
        cuts: for one request after another, how many body bytes go out before the connection is cut.
        statuses: for one request after another, a status instead of the file.
        stated_length: Content-Length, whatever the body's is.
        stall_after: body bytes after which every request waits for the test's end.
        honours_if_range: whether a changed file is noticed by the server.
    """

    body: bytes
    etag: str | None = '"v1"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    stated_length: int | None = None
    stall_after: int | None = None
    honours_if_range: bool = True
    chunked: bool = False
    redirect: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Received:
    """A request that the server got."""

    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """First byte asked for."""
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.received.append(Received(self.path, headers))
        self.close_connection = True
        file = self.server.files.get(self.path.partition("?")[0])
        if file is None:
            self._plain(404)
        elif file.statuses and (status := file.statuses.pop(0)) != 200:
            self._plain(status, file.headers)
        elif file.redirect is not None:
            self._plain(302, {**file.headers, "Location": file.redirect})
        else:
            self._file(file, headers)

    def _plain(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, file: ServedFile, asked: Mapping[str, str]) -> None:
        start, size = 0, len(file.body)
        current = not file.honours_if_range or asked.get("if-range", file.etag) == file.etag
        if file.ranges and "range" in asked and current:
            start = self.server.received[-1].start
            if start >= size:
                self._plain(416, {"Content-Range": f"bytes */{size}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        if file.etag is not None:
            self.send_header("ETag", file.etag)
        for name, value in file.headers.items():
            self.send_header(name, value)
        if file.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            length = file.stated_length if file.stated_length is not None else size - start
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self._body(file, file.body[start:])

    def _body(self, file: ServedFile, body: bytes) -> None:
        cut = file.cuts.pop(0) if file.cuts else None
        if file.stall_after is not None:
            self.wfile.write(body[: file.stall_after])
            self.server.stalled.set()
            self.server.ended.wait(30)
        elif file.chunked:
            for begin in range(0, len(body if cut is None else body[:cut]), 50_000):
                piece = body[begin : begin + 50_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if cut is None:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body if cut is None else body[:cut])


class FileServer(ThreadingHTTPServer):
    """An HTTP server on loopback that breaks in the ways a test asks for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, ServedFile] = {}
        self.received: list[Received] = []
        self.stalled = threading.Event()
        self.ended = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of the tests."""

    @property
    def address(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, path: str, file: ServedFile) -> str:
        """Add a file; returns its address."""
        self.files[path] = file
        return f"{self.address}{path}"
