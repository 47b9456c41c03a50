"""The Inference service of the gRPC API: messages to requests, chunks to messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from edge_runtime.daemon.grpc_boundary import current_caller
from edge_runtime.daemon.requests import Chunk, ContributionCounts, GenerationRequest, Usage
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import DeadlineError, RequestError
from edge_runtime.v1 import inference_pb2 as pb
from edge_runtime.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service

_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_MODES: dict[int, Literal["", "exact", "relaxed"]] = {
    pb.MODE_UNSPECIFIED: "",
    pb.MODE_EXACT: "exact",
    pb.MODE_RELAXED: "relaxed",
}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Text, tokens and vectors. Errors are raised as they are; the boundary translates them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        """A prompt's continuation."""
        prompt: str | tuple[int, ...] | None = None
        match request.WhichOneof("prompt"):
            case "text":
                prompt = request.text
            case "tokens":
                prompt = tuple(request.tokens.ids)
        return self._answer(_generation_request(request, context, prompt=prompt))

    def Chat(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        """A conversation's next turn."""
        if not request.messages:
            raise RequestError("a conversation of no messages; at least one is needed")
        messages = tuple({"role": turn.role, "content": turn.content} for turn in request.messages)
        return self._answer(_generation_request(request, context, messages=messages))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Text to tokens."""
        tokens = await self._service.tokenize(
            request.text,
            model=request.model,
            add_bos=request.add_bos if request.HasField("add_bos") else True,
            parse_special=request.parse_special,
        )
        return pb.TokenizeResponse(tokens=tokens)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        """Tokens to text."""
        text = await self._service.detokenize(tuple(request.tokens), model=request.model)
        return pb.DetokenizeResponse(text=text)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """Inputs to vectors."""
        if not request.inputs:
            raise RequestError("no inputs to embed; at least one is needed")
        result = await self._service.embed(
            [_embed_input(given) for given in request.inputs],
            model=request.model,
            client=current_caller().name,
            timeout=_remaining_seconds(context),
        )
        embeddings = [pb.Embedding(values=vector) for vector in result.vectors]
        return pb.EmbedResponse(embeddings=embeddings, prompt_tokens=result.prompt_tokens)

    async def _answer(self, request: GenerationRequest) -> AsyncIterator[pb.GenerateResponse]:
        async with await self._service.generate(request) as answer:
            started = pb.Started(id=answer.id, model=answer.model, prompt_tokens=answer.prompt_tokens)
            yield pb.GenerateResponse(started=started)
            async for chunk in answer:
                yield pb.GenerateResponse(chunk=_chunk(chunk))
            if answer.usage is None:
                raise RuntimeError("an answer ended without its usage")
            yield pb.GenerateResponse(finished=_finished(answer.usage))


def _generation_request(
    request: pb.GenerateRequest | pb.ChatRequest,
    context: Any,
    *,
    prompt: str | tuple[int, ...] | None = None,
    messages: tuple[dict[str, str], ...] | None = None,
) -> GenerationRequest:
    if request.mode not in _MODES:  # an enum's field can hold any number
        raise RequestError(f"mode = {request.mode}; possible are MODE_EXACT and MODE_RELAXED")
    return GenerationRequest(
        model=request.model,
        prompt=prompt,
        messages=messages,
        sampling=SamplingParameters(**{field.name: value for field, value in request.sampling.ListFields()}),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        stop=tuple(request.stop),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        timeout=_remaining_seconds(context),
        client=current_caller().name,
        mode=_MODES[request.mode],
        quality=request.quality if request.HasField("quality") else None,
        adapters=_adapters(request),
    )


def _adapters(request: pb.GenerateRequest | pb.ChatRequest) -> tuple[tuple[str, float], ...] | None:
    if request.no_adapters and request.adapters:
        raise RequestError(f"no_adapters, and {len(request.adapters)} adapters; give one of the two")
    if not request.adapters:
        return () if request.no_adapters else None
    return tuple(
        (choice.name, choice.strength if choice.HasField("strength") else 1.0) for choice in request.adapters
    )


def _remaining_seconds(context: Any) -> float | None:
    """Until the call's deadline; None without one.

    Raises:
        DeadlineError: it is over.
    """
    remaining: float | None = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineError("the call's deadline was over before the work began; allow more time")
    return remaining


def _embed_input(given: pb.EmbedInput) -> str | Sequence[int]:
    match given.WhichOneof("input"):
        case "text":
            return given.text
        case "tokens":
            return tuple(given.tokens.ids)
    raise RequestError("an input without text and without tokens; one of them is needed")


def _chunk(chunk: Chunk) -> pb.TextChunk:
    logprobs = [
        pb.TokenLogprob(
            token=entry.token,
            raw=entry.raw,
            logprob=entry.logprob,
            top=[
                pb.TokenLogprob.Alternative(token=token, raw=raw, logprob=logprob)
                for token, raw, logprob in entry.top
            ],
        )
        for entry in chunk.logprobs
    ]
    return pb.TextChunk(text=chunk.text, tokens=chunk.tokens, logprobs=logprobs)


def _finished(usage: Usage) -> pb.Finished:
    return pb.Finished(
        reason=_REASONS[usage.finish_reason],
        seed=usage.seed,
        prompt_tokens=usage.prompt_tokens,
        reused_tokens=usage.reused_tokens,
        generated_tokens=usage.generated_tokens,
        queue_seconds=usage.queue_seconds,
        prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds,
        contributions=None if usage.contributions is None else _contributions(usage.contributions),
    )


def _contributions(counts: ContributionCounts) -> pb.ContributionCounts:
    return pb.ContributionCounts(
        on_time=counts.on_time,
        late=counts.late,
        lost=counts.lost,
        recomputed=counts.recomputed,
        fell_back=counts.fell_back,
    )
