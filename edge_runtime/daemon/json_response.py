"""Answers in JSON, whole ones and streams of events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

# In ASCII: a line break of Unicode would end an event for some clients. json.dumps would make an encoder anew
# for each event.
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """Compact JSON, in ASCII and in one line."""
    return _encode(value).encode()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that consists of one JSON value."""
    body = json_bytes(value) + b"\n"  # so that a shell's prompt does not stick to what curl shows
    return Response(body, status, dict(headers or {}), media_type="application/json")
