"""``/v1``: text, embeddings and models as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.daemon import openai_format as form
from edge_runtime.daemon.answer import Answer
from edge_runtime.daemon.auth import Gate, Scope
from edge_runtime.daemon.event_stream import EventStream
from edge_runtime.daemon.http_boundary import client_of, identify, read_json, while_connected
from edge_runtime.daemon.http_errors import ClientGoneError, ParameterError
from edge_runtime.daemon.json_response import json_response
from edge_runtime.daemon.openai_schema import Wanted, chat_request, completion_request, embedding_request
from edge_runtime.daemon.requests import Chunk, Usage
from edge_runtime.daemon.service import Service
from edge_runtime.errors import ModelNotFoundError

_Piece = tuple[int, Chunk | None]  # which answer, and its next chunk; None at its end


class OpenAIApi:
    """The handlers of these routes.

    Args:
        service: what answers.
        gate: who may ask.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._generate(request, chat_request, _chat_events, _chat_json)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._generate(request, completion_request, _completion_events, _completion_json)

    async def _generate(
        self,
        request: Request,
        read: Callable[[dict[str, Any], str], Wanted],
        events: Callable[[Service, Wanted], AsyncGenerator[Any, None]],
        whole: Callable[[Service, Wanted], Any],
    ) -> Response:
        identity = identify(request, self._gate, Scope.INFER)
        values = await read_json(request, self._service.config.server.max_body_bytes)
        wanted = read(values, client_of(request, identity))
        if wanted.stream:
            return EventStream(events(self._service, wanted))
        async with while_connected(request.receive):
            answer = await whole(self._service, wanted)
        return json_response(answer)

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        identity = identify(request, self._gate, Scope.INFER)
        wanted = embedding_request(
            await read_json(request, self._service.config.server.max_body_bytes),
        )
        async with while_connected(request.receive):
            found = await self._service.embed(
                wanted.inputs,
                model=wanted.model,
                client=client_of(request, identity),
                timeout=wanted.timeout,
            )
        width = len(found.vectors[0])
        if wanted.dimensions not in (None, width):
            raise ParameterError(
                f"dimensions is {wanted.dimensions}; the model's vectors have {width}", "dimensions"
            )
        name = wanted.model or self._service.default_model
        return json_response(form.embeddings_json(found, name, wanted.base64))

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        identify(request, self._gate, Scope.INFER)
        rows = [form.model_json(model) for model in self._service.models()]
        return json_response({"object": "list", "data": rows})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{name}``."""
        identify(request, self._gate, Scope.INFER)
        name = request.path_params["name"]
        for model in self._service.models():
            if model.name == name:
                return json_response(form.model_json(model))
        raise ModelNotFoundError("there is no such model here; GET /v1/models lists those there are")


async def _answers(service: Service, wanted: Wanted, stack: AsyncExitStack) -> list[Answer]:
    """Queue every request; whatever happens later, the stack cancels those not finished."""
    answers = []
    for request in wanted.requests:
        answers.append(await stack.enter_async_context(await service.generate(request)))
    return answers


async def _pieces(answers: Sequence[Answer]) -> AsyncGenerator[_Piece, None]:
    """The chunks of all answers as they come, each answer's end as None. The first error ends them all."""
    if len(answers) == 1:  # nearly always
        async for chunk in answers[0]:
            yield 0, chunk
        yield 0, None
        return
    # A piece waits in the queue only until the client has taken those before; answers are bounded anyway.
    pieces: asyncio.Queue[_Piece | Exception] = asyncio.Queue()

    async def forward(index: int, answer: Answer) -> None:
        try:
            async for chunk in answer:
                pieces.put_nowait((index, chunk))
            pieces.put_nowait((index, None))
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece[1] is None
            yield piece
    finally:
        for task in tasks:
            task.cancel()


def _usage(answer: Answer) -> Usage:
    if answer.usage is None:  # only an answer that was cancelled ends without one
        raise ClientGoneError
    return answer.usage


async def _collected(service: Service, wanted: Wanted) -> tuple[list[Answer], list[list[Chunk]]]:
    """All answers, complete, and their chunks."""
    async with AsyncExitStack() as stack:
        answers = await _answers(service, wanted, stack)
        chunks: list[list[Chunk]] = [[] for _ in answers]
        async for index, chunk in _pieces(answers):
            if chunk is not None:
                chunks[index].append(chunk)
    return answers, chunks


def _head(answer: Answer, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{answer.id}",
        "object": kind,
        "created": int(answer.created),
        "model": answer.model,
    }


async def _chat_json(service: Service, wanted: Wanted) -> dict[str, Any]:
    (answer,), (chunks,) = await _collected(service, wanted)
    usage = _usage(answer)
    choice = form.chat_choice(chunks, usage, wanted.requests[0].logprobs is not None)
    head = _head(answer, "chatcmpl", "chat.completion")
    return head | {"choices": [choice], "usage": form.usage_json([usage])}


async def _completion_json(service: Service, wanted: Wanted) -> dict[str, Any]:
    answers, chunks = await _collected(service, wanted)
    usages = [_usage(answer) for answer in answers]
    with_logprobs = wanted.requests[0].logprobs is not None
    choices = [
        form.completion_choice(index, chunks[index], usages[index], with_logprobs)
        for index in range(len(answers))
    ]
    head = _head(answers[0], "cmpl", "text_completion")
    return head | {"choices": choices, "usage": form.usage_json(usages)}


async def _chat_events(service: Service, wanted: Wanted) -> AsyncGenerator[Any, None]:
    """First the role, then text, then the reason of the end, then, if wanted, what it took."""
    with_logprobs = wanted.requests[0].logprobs is not None
    no_usage = {"usage": None} if wanted.include_usage else {}
    async with AsyncExitStack() as stack:
        (answer,) = await _answers(service, wanted, stack)
        head = _head(answer, "chatcmpl", "chat.completion.chunk")

        def event(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return head | {"choices": [choice]} | no_usage

        begun = False
        async for chunk in answer:
            if not begun:
                begun = True
                yield event({"role": "assistant", "content": ""})
            if chunk.text or chunk.logprobs:
                logprobs = form.chat_logprobs(chunk.logprobs) if with_logprobs else None
                yield event({"content": chunk.text}, logprobs)
        usage = _usage(answer)
        if not begun:
            yield event({"role": "assistant", "content": ""})
        yield event({}, reason=usage.finish_reason)
        if wanted.include_usage:
            yield head | {"choices": [], "usage": form.usage_json([usage])}


async def _completion_events(service: Service, wanted: Wanted) -> AsyncGenerator[Any, None]:
    """Text of all choices as it comes, the reason of each one's end, then, if wanted, what they took."""
    with_logprobs = wanted.requests[0].logprobs is not None
    no_usage = {"usage": None} if wanted.include_usage else {}
    async with AsyncExitStack() as stack:
        answers = await _answers(service, wanted, stack)
        head = _head(answers[0], "cmpl", "text_completion")
        logprobs = [form.CompletionLogprobs() for _ in answers]
        pieces = _pieces(answers)
        stack.push_async_callback(pieces.aclose)
        async for index, chunk in pieces:
            choice: dict[str, Any] = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
            if chunk is None:
                choice["finish_reason"] = _usage(answers[index]).finish_reason
            elif chunk.text or chunk.logprobs:
                choice["text"] = chunk.text
                choice["logprobs"] = logprobs[index].json(chunk.logprobs) if with_logprobs else None
            else:
                continue
            yield head | {"choices": [choice]} | no_usage
        if wanted.include_usage:
            usages = [_usage(answer) for answer in answers]
            yield head | {"choices": [], "usage": form.usage_json(usages)}
