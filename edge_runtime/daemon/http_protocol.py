"""One HTTP connection, with limits on how long a client may let it wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_runtime.daemon.json_response import json_bytes

MAX_CONNECTIONS = 256  # a file descriptor and about 30 KB each
HEAD_SECONDS = 10.0  # from the connection, or the head's first byte, to its last
BODY_SECONDS = 60.0  # for the whole body
STALL_SECONDS = 30.0  # without taking any of the answer
_LINGER_SECONDS = 2.0  # closing at once would make the system discard an answer that is not read yet
_MAX_UNWANTED_BYTES = 16 << 20  # of a request that was refused already
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\n"
_BAD = b"HTTP/1.1 400 Bad Request\r\n"


# A client that vanished without a word is noticed after about a minute; not every system has all of these.
_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 30),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 60_000),  # milliseconds
)


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, but neither a slow sender nor a slow reader holds a connection for ever.

    A request has so many seconds to arrive, however little by little it does, and an answer that is not
    taken ends the connection. uvicorn's own limit covers only the pause between two requests.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._arrival: asyncio.TimerHandle | None = None  # until the request must be complete
        self._awaited: type[h11.Request] | type[h11.Data] | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unwanted = 0
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        full = len(self.connections) >= MAX_CONNECTIONS
        super().connection_made(transport)
        # Without a margin, writing pauses as soon as the system takes no more, so every stall is seen. With 0
        # instead of 1, asyncio's TLS would never go on.
        transport.set_write_buffer_limits(high=1, low=0)
        _notice_death(transport.get_extra_info("socket"))
        if full:
            self._refuse(_BUSY, f"{MAX_CONNECTIONS} connections are open; try again", "overloaded")
            transport.close()
            return
        self._expect(h11.Request)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        unwanted = self._refused or self.conn.our_state is h11.DONE
        self._unwanted = self._unwanted + len(data) if unwanted else 0
        if self._unwanted > _MAX_UNWANTED_BYTES:
            self.transport.abort()
        elif not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        if self._refused:
            return
        if self.transport.is_closing() or state not in (h11.IDLE, h11.SEND_BODY):
            self._expect(None)
        elif state is h11.SEND_BODY:
            self._expect(h11.Data)
        elif self.conn.trailing_data[0]:
            self._expect(h11.Request)
        else:
            self._expect(None)  # between two requests, which is uvicorn's to limit

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP. uvicorn's own answer is no JSON, and fails in the middle of a request."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # whoever waits for the rest of the body need not
            cycle.message_event.set()
        self._refuse(_BAD, "this is no HTTP request, or its head is too long", "invalid_request")
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._expect(None)
            self._arrival = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._stop_stall()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it where the connection broke

    def _expect(self, what: type[h11.Request] | type[h11.Data] | None) -> None:
        """Give the client so long to send the rest; more of the same does not prolong it."""
        if what is self._awaited and what is not None:
            return
        self._awaited = what
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        if what is not None:
            seconds = HEAD_SECONDS if what is h11.Request else BODY_SECONDS
            self._arrival = self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, head: bytes, message: str, code: str) -> None:
        kind = "server_error" if head is _BUSY else "invalid_request_error"
        body = json_bytes({"error": {"message": message, "type": kind, "param": None, "code": code}})
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._refused = True
        self.transport.write(head + fields.encode() + body)

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def _notice_death(connection: socket.socket) -> None:
    for level, name, value in _SOCKET_OPTIONS:
        with contextlib.suppress(AttributeError, OSError):
            connection.setsockopt(level, getattr(socket, name), value)
