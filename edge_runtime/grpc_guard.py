"""What stands around every method of a gRPC server: who may call, what a message must be, how errors look.

Everything between the network and the servicers is here, so that none of them can forget it, and so that
nothing internal leaves the program: what a client sees of an error is what the error catalogue says.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from edge_runtime import __version__
from edge_runtime.error_catalog import CODE_KEY, INTERNAL, RETRY_KEY, answer_to
from edge_runtime.errors import DeadlineError, OverloadedError, RequestError, UnavailableError

PACKAGE = "edge_runtime.v1"
STALL_SECONDS = 60.0  # a client that takes nothing for so long has gone
MAX_PARTS = 4096  # messages inside a message, such as the turns of a conversation
MAX_MESSAGE_BYTES = 1500  # percent-encoded at worst threefold, and clients take headers of 8 KiB

_log = logging.getLogger("edgert.grpc")


class Guard(ABC, grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands around every method of a server; a subclass says who may call.

    Args:
        stall_seconds: a stream's client that takes nothing for so long is given up.
        most_bytes: longest request of a method, by its full name; others may be as long as the server takes.
    """

    def __init__(
        self, *, stall_seconds: float = STALL_SECONDS, most_bytes: Mapping[str, int] | None = None
    ) -> None:
        self._stall_seconds = stall_seconds
        self._most_bytes = dict(most_bytes or {})
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    @abstractmethod
    def admitted(self, method: str, context: Any) -> AbstractAsyncContextManager[None]:
        """Lies around one call, in its task; refuses it by raising before it begins."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler, guarded; None, which grpc answers with UNIMPLEMENTED, if there is none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is None:  # only for methods that there are, so this stays small
            guarded = self._handlers[method] = self._guard(handler, method)
        return guarded

    def _guard(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        behaviour, make = _parts_of(handler)
        streams_requests, most = handler.request_streaming, self._most_bytes.get(method)

        def read(raw: bytes) -> Any:
            return _read(raw, handler.request_deserializer, most)

        async def serve(raw: Any, context: Any) -> Any:
            try:
                async with self.admitted(method, context):
                    result = behaviour(_read_all(raw, read) if streams_requests else read(raw), context)
                    if not handler.response_streaming or not hasattr(result, "__aiter__"):
                        return await result  # the latter: a stream that writes its messages itself
                    await self._send(result, context)
                    return None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise  # the client has gone, or its deadline is over: nobody reads an answer
                await _refuse(context, method, UnavailableError("the daemon gave this request up; try again"))
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _refuse(context, method, error)

        # The message is read in there: after the caller was checked, so that strangers cannot make the daemon
        # unpack theirs, and where a message that is none gets an answer of ours.
        return make(serve, request_deserializer=None, response_serializer=handler.response_serializer)

    async def _send(self, responses: AsyncIterator[Any], context: Any) -> None:
        """Send what a servicer yields.

        Written here instead of handing the generator to grpc: a client that goes away cancels this task, and
        so the generator is closed at once, wherever it stands, and not when it is collected.
        """
        async with aclosing(responses) as messages:  # type: ignore[type-var]
            async for message in messages:
                try:
                    async with asyncio.timeout(self._stall_seconds):
                        await context.write(message)
                except TimeoutError:
                    raise DeadlineError(
                        f"nothing was read for {self._stall_seconds:g} s; read or cancel the stream"
                    ) from None


def _parts_of(
    handler: grpc.RpcMethodHandler,
) -> tuple[Callable[..., Any], Callable[..., grpc.RpcMethodHandler]]:
    """The function behind a handler, and what makes a handler of its kind."""
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _read(raw: bytes, read: Callable[[bytes], Any], most: int | None) -> Any:
    if most is not None and len(raw) > most:
        raise RequestError(f"the message has {len(raw)} bytes; this method takes at most {most}")
    try:
        request = read(raw)
    except (DecodeError, ValueError) as error:  # ValueError: text that is no UTF-8, in some implementations
        owner = getattr(read, "__self__", None)
        wanted = "message of this method" if owner is None else owner.DESCRIPTOR.full_name
        raise RequestError(
            f"the message is no {wanted}; make the client's stubs from the proto files in use"
        ) from error
    if request.DESCRIPTOR.file.package == PACKAGE:
        _refuse_unknown_fields(request)
    return request


async def _read_all(raws: AsyncIterator[bytes], read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for raw in raws:
        yield read(raw)


def _refuse_unknown_fields(message: Message) -> None:
    """A setting that this version does not know would be ignored silently, and the answer be another one."""
    unknown = sorted({field.field_number for field in UnknownFieldSet(message)})
    if unknown:
        raise RequestError(
            f"{message.DESCRIPTOR.name} has fields unknown to this daemon (version {__version__}): "
            f"{', '.join(map(str, unknown[:8]))}; use a client of the same version"
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        parts = (value,) if isinstance(value, Message) else value
        if len(parts) > MAX_PARTS:  # an empty part takes two bytes on the wire and a hundred in memory
            raise RequestError(
                f"{message.DESCRIPTOR.name}.{field.name} has {len(parts)} entries; possible are {MAX_PARTS}"
            )
        for part in parts:
            _refuse_unknown_fields(part)


async def _refuse(context: Any, method: str, error: BaseException) -> NoReturn:
    answer, code, message = answer_to(error)
    if answer is INTERNAL:
        _log.error("%s failed", method, exc_info=error)
    metadata = [(CODE_KEY, code)]
    if isinstance(error, OverloadedError):
        metadata.append((RETRY_KEY, str(max(1, round(error.retry_after * 1000)))))
    await context.abort(grpc.StatusCode[answer.grpc], _clipped(message), tuple(metadata))
    raise AssertionError("abort always raises")


def _clipped(message: str) -> str:
    """A message that fits into a header, whatever name a client chose and the message quotes."""
    raw = message.encode("utf-8", "replace")
    return (
        message
        if len(raw) <= MAX_MESSAGE_BYTES
        else raw[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."
    )
