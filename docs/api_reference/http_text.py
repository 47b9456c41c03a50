"""What the HTTP API takes, found by asking its own code: routes, scopes, and the parameters of a body."""

from __future__ import annotations

import ast
import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from starlette.requests import Request
from starlette.routing import Route

from edge_runtime.daemon import edits_api, http_app, json_fields, openai_schema
from edge_runtime.daemon.auth import Scope

_DAEMON = Path(http_app.__file__).parent

# A body for each route that leads its reader through every object inside.
_BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (
        lambda values: openai_schema.chat_request(values, ""),
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}],
            "adapters": [{"name": ""}],
            "stream": True,
            "stream_options": {},
        },
    ),
    "/v1/completions": (
        lambda values: openai_schema.completion_request(values, ""),
        {"prompt": "", "stream": True, "stream_options": {}, "adapters": [{"name": ""}]},
    ),
    "/v1/embeddings": (openai_schema.embedding_request, {"input": ""}),
    "/v1/edits": (
        edits_api.edit_request,
        {"prompt": "Ann Lee lives in", "subject": "Ann Lee", "target": "Oslo", "paraphrases": []},
    ),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route.

    Attributes:
        scope: what a token must allow; None where none is asked for.
    """

    method: str
    path: str
    scope: Scope | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field of a body.

    Attributes:
        type: in words; empty where the reader looks at the value itself.
        use: ``used``, ``refused`` (unless its value asks for nothing) or ``ignored``.
    """

    name: str
    type: str
    use: str


class _AskedError(Exception):
    """Ends a handler as soon as it has said which scope it needs."""


class _Gate:
    def admit(self, token: str | None, address: str, scope: Scope) -> Any:
        raise _AskedError(scope)


def routes() -> list[Endpoint]:
    """All routes in their order."""
    app = http_app.build_app(None, _Gate())  # type: ignore[arg-type]
    found = []
    for route in app.routes:
        assert isinstance(route, Route)
        method = sorted((route.methods or set()) - {"HEAD"})[0]
        found.append(Endpoint(method, route.path, _scope_of(route)))
    return found


def _scope_of(route: Route) -> Scope | None:
    request = Request({"type": "http", "method": "GET", "path": route.path, "headers": [], "client": None})
    try:
        asyncio.run(route.endpoint(request))
    except _AskedError as asked:
        scope: Scope = asked.args[0]
        return scope
    except AttributeError:  # it needs the service, and has asked for no token before
        return None
    return None


def parameters(path: str) -> list[Parameter]:
    """What a body for a path may have, in the order in which it is read."""
    read, body = _BODIES[path]
    found: dict[str, Parameter] = {}

    class Recording(json_fields.Fields):
        """Notes what is taken, as what, and to which end."""

        _inside = False

        def take(self, name: str) -> Any:
            if not self._inside:
                self._note(name, "", "used")
            return super().take(name)

        def text(self, name: str) -> Any:
            return self._noted(name, "text", lambda: super(Recording, self).text(name))

        def boolean(self, name: str) -> Any:
            return self._noted(name, "true or false", lambda: super(Recording, self).boolean(name))

        def integer(self, name: str, low: int, high: int) -> Any:
            limits = f"at least {low}" if high == 2**31 - 1 else f"{_limit(low)} to {_limit(high)}"
            kind = f"whole number, {limits}"
            return self._noted(name, kind, lambda: super(Recording, self).integer(name, low, high))

        def number(self, name: str) -> Any:
            return self._noted(name, "number", lambda: super(Recording, self).number(name))

        def refuse(self, name: str, acceptable: Any, advice: str) -> None:
            self._noted(
                name,
                "",
                lambda: super(Recording, self).refuse(name, acceptable, advice),
                use=f"refused: {advice}",
            )

        def ignore(self, *names: str) -> None:
            for name in names:
                self._noted(name, "", lambda name=name: super(Recording, self).ignore(name), use="ignored")

        def _noted(self, name: str, kind: str, read: Any, *, use: str = "used") -> Any:
            self._note(name, kind, use)
            self._inside = True
            try:
                return read()
            finally:
                self._inside = False

        def _note(self, name: str, kind: str, use: str) -> None:
            full = self.named(name).replace("[0]", "[]")
            found.setdefault(full, Parameter(full, kind, use))

    with patch.object(openai_schema, "Fields", Recording), patch.object(edits_api, "Fields", Recording):
        read(body)
    return list(found.values())


def _limit(number: int) -> str:
    for power in (63, 64):
        if number in (2**power, 2**power - 1, -(2**power)):
            return f"{'-' if number < 0 else ''}2^{power}{'-1' if number == 2**power - 1 else ''}"
    return str(number)


def codes_of_http() -> dict[str, set[int]]:
    """Error codes that only HTTP has -> its status codes, from wherever they are raised."""
    found: dict[str, set[int]] = {}
    for status, code in http_app._CODES.items():
        found.setdefault(code, set()).add(status)
    for file in sorted(_DAEMON.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "HttpError":
                values = [getattr(argument, "value", None) for argument in node.args[:2]]
                match values:
                    case [int(status), str(code)]:
                        found.setdefault(code, set()).add(status)
    return found
