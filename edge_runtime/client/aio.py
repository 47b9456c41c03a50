"""The client for asyncio programs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from edge_runtime.client import types, wire
from edge_runtime.client.aio_edits import AsyncEdits
from edge_runtime.client.connection import (
    DEFAULT_ADDRESS,
    OPTIONS,
    Connection,
    connection,
    local_connection,
    seconds_of,
)
from edge_runtime.client.failures import failure
from edge_runtime.errors import UnavailableError
from edge_runtime.v1 import (
    daemon_pb2,
    daemon_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

Value = TypeVar("Value")


class AsyncStream(AsyncIterator[types.Chunk]):
    """An answer as it comes. Leaving an ``async with`` block, or `close`, cancels the rest.

    Attributes:
        id: of the request, as ``edgert ps`` shows it.
        model: that answers.
        prompt_tokens: length of the prompt.
        usage: what it took; None until the last chunk has been read.

    Raises (while iterating):
        EdgeRuntimeError: as the daemon says; DeadlineError: the time is over; UnavailableError: the daemon
            is stopping, or the connection broke.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._parts: list[str] = []
        self._closed = False
        self.id = ""
        self.model = ""
        self.prompt_tokens = 0
        self.usage: types.Usage | None = None

    async def _start(self) -> AsyncStream:
        try:
            started = (await self._next_message()).started
        except BaseException:  # whoever waited was cancelled, too
            self.close()
            raise
        self.id, self.model, self.prompt_tokens = started.id, started.model, started.prompt_tokens
        return self

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> types.Chunk:
        if self._closed or self.usage is not None:
            raise StopAsyncIteration
        message = await self._next_message()
        if message.WhichOneof("event") != "chunk":
            self.usage = wire.usage(message.finished)
            raise StopAsyncIteration
        self._parts.append(message.chunk.text)
        return wire.chunk(message.chunk)

    async def text(self) -> str:
        """The whole text, from the beginning; waits for the rest of it."""
        async for _ in self:
            pass
        return "".join(self._parts)

    def close(self) -> None:
        """Stop the answer; the daemon frees its place within one token. Safe to call twice."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next_message(self) -> Any:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._address) from None
        except asyncio.CancelledError:
            if self._closed and not _is_cancelled_itself():
                raise StopAsyncIteration from None  # another task closed the stream
            raise
        if message is grpc.aio.EOF:
            raise UnavailableError(f"{self._address} ended the answer too early; try again")
        return message


class AsyncModels:
    """The models of a daemon; made by :class:`AsyncClient`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def _stub(self) -> Any:
        return models_pb2_grpc.ModelsStub(self._client._channel)

    async def list(self) -> tuple[types.Model, ...]:
        """All models of the store, the built-in one first."""
        return wire.models(await self._client._call(self._stub.List, models_pb2.ListModelsRequest()))

    async def describe(self, name: str = "") -> types.ModelDescription:
        """What a model is; by default the daemon's default model.

        Raises:
            ModelNotFoundError: there is none of that name. ModelFileError: it is damaged.
        """
        request = wire.built(models_pb2.DescribeModelRequest, name=name)
        return wire.description(await self._client._call(self._stub.Describe, request))

    async def pull(
        self, source: str, *, name: str | None = None, sha256: str | None = None, replace: bool = False
    ) -> AsyncGenerator[types.PullProgress]:
        """Fetch a model into the store; needs the scope ``admin``.

        Closing the iterator stops the download, which a later pull resumes. There is no time limit.

        Args:
            source: ``hf:OWNER/REPOSITORY/FILE.gguf`` or an https address.
            name: in the store, by default the file's.
            sha256: what the file must hash to.
            replace: whether a model of the same name gives way.

        Yields:
            the progress; the last one has the model.

        Raises:
            DownloadError, ModelFileError, RequestError: as ``edgert models pull`` does.
        """
        request = wire.built(
            models_pb2.PullModelRequest, source=source, name=name, sha256=sha256, replace=replace
        )
        call = self._stub.Pull(request, metadata=self._client._connection.metadata)
        try:
            async for message in call:
                yield wire.pull_progress(message)
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._client.address) from None
        finally:
            call.cancel()

    async def load(self, name: str = "") -> types.LoadedModel:
        """Bring a model into memory; needs the scope ``admin``.

        Raises:
            ModelNotFoundError, ModelFileError, OutOfMemoryError, OverloadedError.
        """
        request = wire.built(models_pb2.LoadModelRequest, name=name)
        return wire.loaded_model((await self._client._call(self._stub.Load, request)).model)

    async def unload(self, name: str) -> None:
        """Take a model out of memory once its requests have ended; needs the scope ``admin``."""
        await self._client._call(self._stub.Unload, wire.built(models_pb2.UnloadModelRequest, name=name))

    async def remove(self, name: str) -> None:
        """Delete a model from the store; needs the scope ``admin``.

        Raises:
            ModelNotFoundError: there is none of that name. RequestError: it is the built-in one.
        """
        await self._client._call(self._stub.Remove, wire.built(models_pb2.RemoveModelRequest, name=name))


class AsyncClient:
    """A daemon, to be called from one event loop: the one that runs at its first call.

    ::

        async with AsyncClient.local() as client:
            async for chunk in await client.generate("The capital of France is", max_tokens=8):
                print(chunk.text, end="", flush=True)

    Args:
        address: HOST:PORT of the daemon's gRPC API.
        token: of ``edgert token create``, where the daemon asks for one.
        ca: PEM file of the authority that signed the daemon's certificate; None for no TLS.
        timeout: seconds that each call may take unless it says otherwise; None: the daemon's own limit.
        tls: True without ``ca``: TLS with the system's authorities.

    Attributes:
        address: as given.
        models: the daemon's models.
        edits: what they were taught.

    Raises:
        ConfigError: an argument is not valid, or a token would travel in the clear.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        *,
        tls: bool | None = None,
    ) -> None:
        self._open(connection(address, token, ca, timeout, tls))

    @classmethod
    def local(cls, timeout: float | None = None) -> AsyncClient:
        """The daemon that runs on this device, with its own address, token and certificate.

        Raises:
            UnavailableError: none runs.
        """
        client = cls.__new__(cls)
        client._open(local_connection(timeout))
        return client

    def _open(self, found: Connection) -> None:
        self._connection = found
        self._opened: grpc.aio.Channel | None = None
        self.address = found.address
        self.models = AsyncModels(self)
        self.edits = AsyncEdits(self)

    @property
    def _channel(self) -> grpc.aio.Channel:
        """Opened with the first call, because a channel belongs to the event loop that runs then."""
        if self._opened is None:
            found = self._connection
            self._opened = (
                grpc.aio.insecure_channel(found.address, OPTIONS)
                if found.credentials is None
                else grpc.aio.secure_channel(found.address, found.credentials, OPTIONS)
            )
        return self._opened

    @property
    def _inference(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self._channel)

    @property
    def _daemon(self) -> Any:
        return daemon_pb2_grpc.DaemonStub(self._channel)

    async def generate(
        self, prompt: str | Sequence[int], **options: Unpack[types.GenerationOptions]
    ) -> AsyncStream:
        """Continue a prompt: text, or token ids taken as they are.

        Args:
            options: see :class:`~edge_runtime.client.types.GenerationOptions`.

        Returns:
            the answer, once the daemon has taken the request.

        Raises:
            RequestError: a value out of range. ContextOverflowError: the prompt is too long.
            ModelNotFoundError: there is no such model. OverloadedError: the daemon's queue is full.
            UnavailableError: there is no daemon, or it is stopping.
        """
        request = wire.generate_request(prompt, options)
        return await self._stream(self._inference.Generate, request, options)

    async def chat(
        self, messages: Iterable[types.Message], **options: Unpack[types.GenerationOptions]
    ) -> AsyncStream:
        """Answer a conversation of ``{"role": ..., "content": ...}``, oldest first.

        Args:
            options: see :class:`~edge_runtime.client.types.GenerationOptions`.

        Raises:
            as for `generate`, and ChatTemplateError: the model's chat template is missing, or refuses these.
        """
        return await self._stream(self._inference.Chat, wire.chat_request(messages, options), options)

    async def embed(
        self, inputs: str | Iterable[str | Sequence[int]], *, model: str = "", timeout: float | None = None
    ) -> types.Embeddings:
        """A vector for each input, text or token ids.

        Raises:
            RequestError: no input, or too many. ContextOverflowError: one is too long.
        """
        request = wire.embed_request(inputs, model)
        return wire.embeddings(await self._call(self._inference.Embed, request, timeout))

    async def tokenize(
        self, text: str, *, model: str = "", add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The tokens of a text.

        Args:
            add_bos: put the begin-of-text token first, where the vocabulary has one.
            parse_special: special tokens written in the text become those tokens.
        """
        request = wire.built(
            inference_pb2.TokenizeRequest,
            text=text,
            model=model,
            add_bos=add_bos,
            parse_special=parse_special,
        )
        return list((await self._call(self._inference.Tokenize, request)).tokens)

    async def detokenize(self, tokens: Sequence[int], *, model: str = "") -> str:
        """The text of tokens.

        Raises:
            RequestError: a number that is no token.
        """
        request = wire.built(inference_pb2.DetokenizeRequest, tokens=tokens, model=model)
        return str((await self._call(self._inference.Detokenize, request)).text)

    async def status(self) -> types.Status:
        """How the daemon fares."""
        return wire.status(await self._call(self._daemon.GetStatus, daemon_pb2.GetStatusRequest()))

    async def shutdown(self) -> None:
        """Ask the daemon to stop, as SIGTERM does; needs the scope ``admin``. Returns at once."""
        await self._call(self._daemon.Shutdown, daemon_pb2.ShutdownRequest())

    async def close(self) -> None:
        """Close the connection; what runs is cancelled. Safe to call twice."""
        if self._opened is not None:
            await self._opened.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.address!r})"

    async def _stream(self, method: Any, request: Any, options: types.GenerationOptions) -> AsyncStream:
        seconds = seconds_of(options.get("timeout"), self._connection)
        call = method(request, timeout=seconds, metadata=self._connection.metadata)
        return await AsyncStream(call, self.address)._start()

    async def _call(
        self, method: Callable[..., Awaitable[Value]], request: Any, timeout: float | None = None
    ) -> Value:
        seconds = seconds_of(timeout, self._connection)
        try:
            return await method(request, timeout=seconds, metadata=self._connection.metadata)
        except grpc.aio.AioRpcError as error:
            raise failure(error, self.address) from None


def _is_cancelled_itself() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
