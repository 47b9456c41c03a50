"""``/v1/edits``: the edits of the device, for the status page and programs without gRPC."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.daemon import editing
from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.http_boundary import identify, read_json
from edge_runtime.daemon.http_errors import ParameterError
from edge_runtime.daemon.json_fields import Fields, checked_text, kind_of
from edge_runtime.daemon.json_response import json_response
from edge_runtime.daemon.personalization import EditEvent
from edge_runtime.daemon.service import Service
from edge_runtime.personalize.edit_report import edit_of, progress_of

_MOST_STEPS = 2**31 - 1


class EditsApi:
    """The handlers of these routes.

    Args:
        service: whose edits they are.
        gate: who may see and make them.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate

    async def edits(self, request: Request) -> Response:
        """``GET /v1/edits``."""
        identify(request, self._gate, Scope.PERSONALIZE)
        events = await self._service.personalization.events()
        return json_response({"object": "list", "data": [_event_json(event) for event in events]})

    async def edit(self, request: Request) -> Response:
        """``GET /v1/edits/{name}``."""
        identify(request, self._gate, Scope.PERSONALIZE)
        record = await self._service.personalization.get(request.path_params["name"])
        return json_response(edit_of(record).as_json())

    async def apply(self, request: Request) -> Response:
        """``POST /v1/edits``: the edit is queued; how far it is, ``GET /v1/edits`` tells."""
        identify(request, self._gate, Scope.PERSONALIZE)
        values = await read_json(request, self._service.config.server.max_body_bytes)
        model, name, asked = edit_request(values)
        record = await self._service.personalization.submit(model, asked, name)
        return json_response(edit_of(record).as_json(), 202)

    async def revert(self, request: Request) -> Response:
        """``POST /v1/edits/{name}/revert``."""
        name = await self._named(request)
        return json_response(edit_of(await self._service.personalization.revert(name)).as_json())

    async def reapply(self, request: Request) -> Response:
        """``POST /v1/edits/{name}/apply``."""
        name = await self._named(request)
        return json_response(edit_of(await self._service.personalization.reapply(name)).as_json())

    async def remove(self, request: Request) -> Response:
        """``DELETE /v1/edits/{name}``; answers with what it was."""
        identify(request, self._gate, Scope.PERSONALIZE)
        record = await self._service.personalization.remove(request.path_params["name"])
        return json_response(edit_of(record).as_json())

    async def cancel(self, request: Request) -> Response:
        """``POST /v1/edits/{name}/cancel``."""
        name = await self._named(request)
        return json_response(edit_of(await self._service.personalization.cancel(name)).as_json())

    async def _named(self, request: Request) -> str:
        """The edit that is to be changed; the body is an empty object, which no page's form can send."""
        identify(request, self._gate, Scope.PERSONALIZE)
        Fields(await read_json(request, self._service.config.server.max_body_bytes)).end()
        name: str = request.path_params["name"]
        return name


def edit_request(values: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """Read a request for an edit: the model, the edit's name, and what the store keeps of it.

    Raises:
        ParameterError: a field has the wrong type or is unknown. RequestError: what is asked for is no edit.
    """
    fields = Fields(values)
    model, name = fields.text("model") or "", fields.text("name")
    texts = [fields.text(key) or "" for key in ("prompt", "subject", "target")]
    paraphrases = _texts(fields.take("paraphrases"), "paraphrases")
    force = fields.boolean("force")
    steps, seconds = fields.integer("steps", 1, _MOST_STEPS), fields.number("seconds")
    fields.end()
    asked = editing.edit_request(
        texts[0], texts[1], texts[2], paraphrases, force=force, steps=steps, seconds=seconds
    )
    return model, name, asked


def _texts(value: object, name: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ParameterError(f"{name} is {kind_of(value)}; needed is an array of strings", name)
    return [checked_text(one, f"{name}[{place}]") for place, one in enumerate(value)]


def _event_json(event: EditEvent) -> dict[str, Any]:
    progress = None if event.progress is None else asdict(progress_of(event.progress))
    return {**edit_of(event.record).as_json(), "behind": list(event.behind), "progress": progress}
