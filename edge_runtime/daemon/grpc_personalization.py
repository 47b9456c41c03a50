"""The Personalization service of the gRPC API: messages to requests, records to messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edge_runtime.daemon import editing
from edge_runtime.daemon.adapter_exchange import AdapterFormat, Gathering, names_of, pieces_of
from edge_runtime.daemon.grpc_edit_messages import check_message, edit_message, step_message
from edge_runtime.errors import RequestError
from edge_runtime.personalize.edit_report import checks_of
from edge_runtime.v1 import personalization_pb2 as pb
from edge_runtime.v1 import personalization_pb2_grpc

if TYPE_CHECKING:
    from edge_runtime.daemon.personalization import Personalization

_FORMATS: dict[int, AdapterFormat] = {
    pb.ADAPTER_FORMAT_UNSPECIFIED: "gguf",
    pb.ADAPTER_FORMAT_GGUF: "gguf",
    pb.ADAPTER_FORMAT_PEFT: "peft",
}


class PersonalizationServicer(personalization_pb2_grpc.PersonalizationServicer):
    """Edits and adapters. Errors are raised as they are; the boundary translates them."""

    def __init__(self, personalization: Personalization) -> None:
        self._edits = personalization

    async def Apply(self, request: pb.ApplyRequest, context: Any) -> AsyncIterator[pb.ApplyProgress]:  # noqa: N802
        """A fact is edited."""
        asked = editing.edit_request(
            request.prompt, request.subject, request.target, tuple(request.paraphrases), **_limits(request)
        )
        record = await self._edits.submit(request.model, asked, _optional(request, "name"))
        async with aclosing(self._follow(str(record.id))) as messages:  # type: ignore[type-var]
            async for message in messages:
                yield message

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> AsyncIterator[pb.ApplyProgress]:  # noqa: N802
        """Queries are refused from now on."""
        queries = [(query.prompt, query.subject) for query in request.queries]
        asked = editing.forget_request(queries, _optional(request, "refusal"), **_limits(request))
        record = await self._edits.submit(request.model, asked, _optional(request, "name"))
        async with aclosing(self._follow(str(record.id))) as messages:  # type: ignore[type-var]
            async for message in messages:
                yield message

    def Follow(self, request: pb.FollowRequest, context: Any) -> AsyncIterator[pb.ApplyProgress]:  # noqa: N802
        """An edit that was asked for before."""
        return self._follow(_named(request.name))

    async def _follow(self, reference: str) -> AsyncIterator[pb.ApplyProgress]:
        state = ""
        async with aclosing(self._edits.follow(reference)) as events:  # type: ignore[type-var]
            async for event in events:
                message = pb.ApplyProgress(behind=event.behind)
                if event.record.state != state:
                    state = event.record.state
                    message.edit.CopyFrom(edit_message(event.record))
                if event.progress is not None:
                    message.step.CopyFrom(step_message(event.progress))
                yield message

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:  # noqa: N802
        """An edit ends."""
        return pb.CancelResponse(edit=edit_message(await self._edits.cancel(_named(request.name))))

    async def List(self, request: pb.ListEditsRequest, context: Any) -> pb.ListEditsResponse:  # noqa: N802
        """All of them."""
        events = await self._edits.events(request.model)
        return pb.ListEditsResponse(edits=[edit_message(event.record) for event in events])

    async def Show(self, request: pb.ShowRequest, context: Any) -> pb.ShowResponse:  # noqa: N802
        """One of them."""
        return pb.ShowResponse(edit=edit_message(await self._edits.get(_named(request.name))))

    async def Revert(self, request: pb.RevertRequest, context: Any) -> pb.RevertResponse:  # noqa: N802
        """What is applied is undone."""
        return pb.RevertResponse(edit=edit_message(await self._edits.revert(_named(request.name))))

    async def Reapply(self, request: pb.ReapplyRequest, context: Any) -> pb.ReapplyResponse:  # noqa: N802
        """What was rejected or undone is applied."""
        return pb.ReapplyResponse(edit=edit_message(await self._edits.reapply(_named(request.name))))

    async def Remove(self, request: pb.RemoveEditRequest, context: Any) -> pb.RemoveEditResponse:  # noqa: N802
        """A record is deleted."""
        return pb.RemoveEditResponse(edit=edit_message(await self._edits.remove(_named(request.name))))

    async def Evaluate(self, request: pb.EvaluateRequest, context: Any) -> AsyncIterator[pb.EvaluateResponse]:  # noqa: N802
        """Edits are tested again."""
        found = self._edits.evaluate(tuple(request.names), request.model)
        async with aclosing(found) as results:  # type: ignore[type-var]
            async for record, report in results:
                yield pb.EvaluateResponse(name=record.name, checks=map(check_message, checks_of(report)))

    async def Export(self, request: pb.ExportRequest, context: Any) -> AsyncIterator[pb.ExportResponse]:  # noqa: N802
        """Adapters as files."""
        with TemporaryDirectory(prefix="edgert-") as folder:
            files = await self._edits.export(tuple(request.names), _format(request.format), Path(folder))
            for name, piece in pieces_of(files):
                yield pb.ExportResponse(file=name, content=piece)

    async def Import(self, requests: AsyncIterator[pb.ImportRequest], context: Any) -> pb.ImportResponse:  # noqa: N802
        """Files that become an adapter."""
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise RequestError("the first message has no header; it says what the adapter is called")
        form = _format(first.header.format)
        with TemporaryDirectory(prefix="edgert-") as folder:
            gathering = Gathering(Path(folder), names_of(form))
            _take(gathering, first)
            async for request in requests:
                if request.HasField("header"):
                    raise RequestError("a second header; only the first message has one")
                _take(gathering, request)
            gathering.end()
            record = await self._edits.take_in(first.header.name, first.header.model, form, Path(folder))
        return pb.ImportResponse(edit=edit_message(record))

    async def Prepare(  # noqa: N802
        self, request: pb.PrepareModelRequest, context: Any
    ) -> AsyncIterator[pb.PrepareModelResponse]:
        """What edits need to know of a model is measured."""
        async with aclosing(self._edits.prepare(request.model)) as steps:  # type: ignore[type-var]
            async for share, layer in steps:
                yield pb.PrepareModelResponse(share=share, layer=layer)


def _take(gathering: Gathering, request: pb.ImportRequest) -> None:
    if request.file or request.content:
        gathering.take(request.file, request.content)


def _format(number: int) -> AdapterFormat:
    found = _FORMATS.get(number)
    if found is None:
        raise RequestError(f"format = {number}; possible are ADAPTER_FORMAT_GGUF and ADAPTER_FORMAT_PEFT")
    return found


def _limits(request: pb.ApplyRequest | pb.ForgetRequest) -> dict[str, Any]:
    return {
        "force": request.force,
        "steps": _optional(request, "steps"),
        "seconds": _optional(request, "seconds"),
    }


def _optional(request: Any, name: str) -> Any:
    return getattr(request, name) if request.HasField(name) else None


def _named(name: str) -> str:
    if not name:
        raise RequestError("no edit is named; give its name or its number, as the list of edits shows them")
    return name
