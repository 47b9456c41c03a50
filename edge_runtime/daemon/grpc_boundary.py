"""The border of the gRPC API: who may call, what a message must look like, what a failure looks like.

Everything between the network and the servicers is here, so that none of them can forget it, and so that
nothing internal leaves the daemon: what a client sees of an error is what the error catalogue says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from edge_runtime import __version__
from edge_runtime.daemon.auth import LOCAL, Gate, Identity, Scope, bearer_token, source_of
from edge_runtime.daemon.error_catalog import INTERNAL, answer_to
from edge_runtime.errors import DeadlineError, OverloadedError, RequestError, UnavailableError

PACKAGE = "edge_runtime.v1"
CODE_KEY = "edgert-code"
RETRY_KEY = "retry-after-ms"
STALL_SECONDS = 60.0  # a client that takes nothing for so long has gone
MAX_PARTS = 4096  # messages inside a message, such as the turns of a conversation
MAX_MESSAGE_BYTES = 1500  # percent-encoded at worst threefold, and clients take headers of 8 KiB

# What each method needs; None: nothing. A method that is not here needs the scope admin.
METHOD_SCOPES: dict[str, Scope | None] = {
    **{
        f"/{PACKAGE}.Inference/{name}": Scope.INFER
        for name in ("Generate", "Chat", "Tokenize", "Detokenize", "Embed")
    },
    f"/{PACKAGE}.Models/List": Scope.INFER,
    f"/{PACKAGE}.Models/Describe": Scope.INFER,
    f"/{PACKAGE}.Models/Pull": Scope.ADMIN,
    f"/{PACKAGE}.Models/Load": Scope.ADMIN,
    f"/{PACKAGE}.Models/Unload": Scope.ADMIN,
    f"/{PACKAGE}.Models/Remove": Scope.ADMIN,
    f"/{PACKAGE}.Daemon/GetStatus": Scope.INFER,
    f"/{PACKAGE}.Daemon/Shutdown": Scope.ADMIN,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.INFER,
}

_log = logging.getLogger("edgert.grpc")

Context = (
    grpc.aio.ServicerContext[Any, Any] if hasattr(grpc.aio.ServicerContext, "__class_getitem__") else Any
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the request that is being served.

    Attributes:
        name: a token's name, or the address where no token was sent: between these the queue is fair.
        identity: what it may do.
    """

    name: str
    identity: Identity


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """The caller of the request that runs in this task."""
    return _caller.get()


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands around every method of the server.

    Args:
        gate: decides on tokens.
        stall_seconds: a stream's client that takes nothing for so long is given up.
    """

    def __init__(self, gate: Gate, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._gate = gate
        self._stall_seconds = stall_seconds
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

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
        read, streams_requests = handler.request_deserializer, handler.request_streaming

        async def serve(raw: Any, context: Any) -> Any:
            try:
                _caller.set(self._admit(method, context))
                result = behaviour(_read_all(raw, read) if streams_requests else _read(raw, read), context)
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

        # The message is read in there: after the token was checked, so that strangers cannot make the daemon
        # unpack theirs, and where a message that is none gets an answer of ours.
        return make(serve, request_deserializer=None, response_serializer=handler.response_serializer)

    def _admit(self, method: str, context: Any) -> Caller:
        scope = METHOD_SCOPES.get(method, Scope.ADMIN)
        address = source_of(context.peer())
        if scope is None:
            return Caller(address, Identity(LOCAL, frozenset()))
        headers = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(headers) > 1:
            raise RequestError(f"{len(headers)} authorization entries; one is needed")
        header = headers[0] if headers else None
        if isinstance(header, bytes):
            header = header.decode("utf-8", "replace")
        identity = self._gate.admit(bearer_token(header), context.peer(), scope)
        return Caller(address if identity.name == LOCAL else identity.name, identity)

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


def _read(raw: bytes, read: Callable[[bytes], Any]) -> Any:
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
        yield _read(raw, read)


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
