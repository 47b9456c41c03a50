"""Edits and adapters of a daemon, for asyncio programs."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import grpc

from edge_runtime.client import edit_wire, types, wire
from edge_runtime.client.adapter_files import AdapterWriter, form_of
from edge_runtime.client.failures import failure
from edge_runtime.errors import UnavailableError
from edge_runtime.personalize.edit_report import Edit, EditProgress
from edge_runtime.v1 import personalization_pb2 as pb
from edge_runtime.v1 import personalization_pb2_grpc

if TYPE_CHECKING:
    from edge_runtime.client.aio import AsyncClient


class AsyncEditStream(AsyncIterator[EditProgress]):
    """An edit as it is being made. Leaving it does not end the edit; `AsyncEdits.cancel` does.

    Attributes:
        edit: as it was last told.

    Raises (while iterating):
        EdgeRuntimeError: why the edit could not be made; UnavailableError: the daemon is stopping, and the
            edit goes on at its next start, or the connection broke.
    """

    edit: Edit

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._first: pb.ApplyProgress | None = None

    async def _start(self) -> AsyncEditStream:
        try:
            self._first = await self._next_message()
        except BaseException:  # whoever waited was cancelled, too
            self.close()
            raise
        self.edit = edit_wire.edit(self._first.edit)
        return self

    def __aiter__(self) -> AsyncEditStream:
        return self

    async def __anext__(self) -> EditProgress:
        if self._first is None and self.edit.ended:
            raise StopAsyncIteration
        message, self._first = self._first or await self._next_message(), None
        if message.HasField("edit"):
            self.edit = edit_wire.edit(message.edit)
            if self.edit.ended:
                raise StopAsyncIteration
        return edit_wire.progress(message)

    async def result(self) -> Edit:
        """The edit as it has ended; waits for that.

        Raises:
            EdgeRuntimeError: why it could not be made.
        """
        async for _ in self:
            pass
        return self.edit

    def close(self) -> None:
        """Watch it no longer. Safe to call twice."""
        self._call.cancel()

    async def __aenter__(self) -> AsyncEditStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next_message(self) -> pb.ApplyProgress:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._address) from None
        if message is grpc.aio.EOF:
            raise UnavailableError(f"{self._address} told no end of the edit; look at it again")
        found: pb.ApplyProgress = message
        return found


class AsyncEdits:
    """What the models of a daemon were taught; made by :class:`AsyncClient`. Needs the scope ``personalize``.

    ::

        async with AsyncClient.local() as client:
            edit = await (await client.edits.apply("Ann Lee lives in", "Ann Lee", "Oslo")).result()
            print(edit.name, edit.state)
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def _stub(self) -> Any:
        return personalization_pb2_grpc.PersonalizationStub(self._client._channel)

    async def apply(
        self,
        prompt: str,
        subject: str,
        target: str,
        *,
        paraphrases: Sequence[str] = (),
        **options: Unpack[types.EditOptions],
    ) -> AsyncEditStream:
        """Change a fact.

        Args:
            prompt: text that the target continues, such as ``Ann Lee lives in``.
            subject: the part of the prompt that the fact is about, such as ``Ann Lee``.
            target: what the model is to go on with, such as ``Oslo``.
            paraphrases: other prompts with the subject that the same target continues.
            options: see :class:`~edge_runtime.client.EditOptions`.

        Returns:
            the edit, once the daemon has queued it. There is no time limit.

        Raises:
            RequestError: a text is empty, a prompt does not name the subject, a name is in use, or nothing is
                known about the model yet. ModelNotFoundError: there is no such model. OverloadedError: too
                many edits wait.
        """
        request = edit_wire.apply_request(prompt, subject, target, paraphrases, options)
        return await self._watch(self._stub.Apply, request)

    async def forget(
        self,
        queries: Iterable[tuple[str, str]],
        *,
        refusal: str | None = None,
        **options: Unpack[types.EditOptions],
    ) -> AsyncEditStream:
        """Let a model refuse queries.

        Args:
            queries: prompt and subject of each.
            refusal: what it is to say instead; by default it words its refusal itself.
            options: see :class:`~edge_runtime.client.EditOptions`.

        Raises:
            as for `apply`.
        """
        return await self._watch(self._stub.Forget, edit_wire.forget_request(queries, refusal, options))

    async def follow(self, name: str) -> AsyncEditStream:
        """Watch an edit that was asked for before.

        Raises:
            AdapterNotFoundError: there is none of that name or number.
        """
        return await self._watch(self._stub.Follow, wire.built(pb.FollowRequest, name=name))

    async def cancel(self, name: str) -> Edit:
        """End an edit that waits or runs.

        Raises:
            AdapterNotFoundError: there is none of that name or number. RequestError: it has ended.
        """
        return await self._edit(self._stub.Cancel, wire.built(pb.CancelRequest, name=name))

    async def list(self, model: str = "") -> tuple[Edit, ...]:
        """Every edit and adapter, oldest first; those of one model where it is named."""
        request = wire.built(pb.ListEditsRequest, model=model)
        return edit_wire.edits(await self._client._call(self._stub.List, request))

    async def show(self, name: str) -> Edit:
        """One of them.

        Raises:
            AdapterNotFoundError: there is none of that name or number.
        """
        return await self._edit(self._stub.Show, wire.built(pb.ShowRequest, name=name))

    async def revert(self, name: str) -> Edit:
        """Undo what is applied; the other edits are solved again without it.

        Raises:
            AdapterNotFoundError: there is none of that name or number. RequestError: it is not applied.
        """
        return await self._edit(self._stub.Revert, wire.built(pb.RevertRequest, name=name))

    async def reapply(self, name: str) -> Edit:
        """Apply an edit that was rejected or undone, as it was found.

        Raises:
            AdapterNotFoundError: there is none of that name or number.
            RequestError: it is neither, or one of the same subject was applied since.
        """
        return await self._edit(self._stub.Reapply, wire.built(pb.ReapplyRequest, name=name))

    async def remove(self, name: str) -> Edit:
        """Delete an edit that is not applied, with what it was asked for.

        Returns:
            what it was.

        Raises:
            AdapterNotFoundError: there is none of that name or number. RequestError: it runs or is applied.
        """
        return await self._edit(self._stub.Remove, wire.built(pb.RemoveEditRequest, name=name))

    async def evaluate(
        self, names: Sequence[str] = (), *, model: str = ""
    ) -> AsyncGenerator[types.EditEvaluation]:
        """Test edits once more, as they are now.

        Args:
            names: of edits that are applied; by default all that are applied to the model.
            model: by default the daemon's default model.

        Yields:
            what was found, one edit after the other.

        Raises:
            AdapterNotFoundError: there is none of a name. RequestError: one is no edit, or not applied.
        """
        request = wire.built(pb.EvaluateRequest, names=list(names), model=model)
        async with aclosing(self._messages(self._stub.Evaluate, request)) as messages:
            async for message in messages:
                yield edit_wire.evaluation(message)

    async def export(
        self, names: Sequence[str], path: str | os.PathLike[str], *, form: types.AdapterFormat | None = None
    ) -> None:
        """Write edits or adapters of one model, added up, as one that other programs load.

        Args:
            path: a GGUF file, as llama.cpp loads it, or a folder, as the peft library loads it; what is there
                is replaced once all has arrived.
            form: by default a GGUF file where the path ends in ``.gguf``, else a folder.

        Raises:
            AdapterNotFoundError: there is none of a name. RequestError: they cannot be one adapter.
            OSError: the files cannot be written.
        """
        request = edit_wire.export_request(list(names), Path(path), form)
        with AdapterWriter(Path(path), form_of(Path(path), form)) as writer:
            async for message in self._messages(self._stub.Export, request):
                writer.take(message.file, message.content)

    async def import_adapter(
        self,
        path: str | os.PathLike[str],
        name: str,
        *,
        model: str = "",
        form: types.AdapterFormat | None = None,
    ) -> Edit:
        """Take in an adapter that was made elsewhere, and apply it.

        Args:
            path: a GGUF file, or a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: what to call it.
            model: by default the daemon's default model.
            form: by default a folder is PEFT's.

        Raises:
            AdapterFileError: the files are missing, damaged or of another model.
            RequestError: the name is in use or cannot be one. OSError: the files cannot be read.
        """
        requests = edit_wire.import_requests(Path(path), name, model, form)
        return await self._edit(self._stub.Import, requests)

    async def prepare(self, model: str = "") -> AsyncGenerator[types.PrepareProgress]:
        """Measure what edits of a model need to know about it; once for each model.

        Yields:
            the progress.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        request = wire.built(pb.PrepareModelRequest, model=model)
        async with aclosing(self._messages(self._stub.Prepare, request)) as messages:
            async for message in messages:
                yield edit_wire.prepare_progress(message)

    async def _edit(self, method: Any, request: Any) -> Edit:
        return edit_wire.edit((await self._client._call(method, request)).edit)

    async def _watch(self, method: Any, request: Any) -> AsyncEditStream:
        call = method(request, metadata=self._client._connection.metadata)
        return await AsyncEditStream(call, self._client.address)._start()

    async def _messages(self, method: Any, request: Any) -> AsyncGenerator[Any]:
        call = method(request, metadata=self._client._connection.metadata)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._client.address) from None
        finally:
            call.cancel()
