"""Server-sent events, for a client that may leave at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_runtime.daemon.http_boundary import while_connected
from edge_runtime.daemon.http_errors import refusal_of
from edge_runtime.daemon.json_response import json_bytes

_log = logging.getLogger("edgert.http")
_DONE = b"data: [DONE]\n\n"
_EVENTS_BETWEEN_PAUSES = 3  # asyncio warns at the fifth write to a connection that broke


class EventStream(Response):
    """Sends each value as an event, and ``[DONE]`` at the end.

    An error before the first value is raised, and so becomes a plain answer with its status; a later one is
    sent as the last event. When the client goes away, the values' source is closed at once.

    Args:
        values: what to send, as JSON.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncGenerator[Any, None]) -> None:
        super().__init__()
        self._values = values
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # a proxy before the daemon is not to hold events back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = 0
        last = _DONE
        async with while_connected(receive), aclosing(self._values):
            try:
                async for value in self._values:
                    if not sent:
                        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        await send(head)
                    event = b"data: " + json_bytes(value) + b"\n\n"
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    sent += 1
                    if sent % _EVENTS_BETWEEN_PAUSES == 0:
                        await asyncio.sleep(0)  # values that lie ready are not to keep others waiting
            except Exception as error:
                if not sent:
                    raise
                refusal = refusal_of(error)
                if not refusal.expected:
                    _log.error("a stream failed", exc_info=error)
                last = b"data: " + json_bytes(refusal.body) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})
