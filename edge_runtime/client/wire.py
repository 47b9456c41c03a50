"""Values to messages and back, for both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from edge_runtime.client import types
from edge_runtime.client.cluster_wire import cluster_report
from edge_runtime.errors import RequestError
from edge_runtime.v1 import daemon_pb2, inference_pb2, models_pb2

_SAMPLING = tuple(field.name for field in inference_pb2.Sampling.DESCRIPTOR.fields)
_OPTIONS = frozenset(types.GenerationOptions.__annotations__)
_REASONS: dict[int, types.FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
_MODES = {"exact": inference_pb2.MODE_EXACT, "relaxed": inference_pb2.MODE_RELAXED}
_STATES: dict[int, types.RequestState] = {
    daemon_pb2.REQUEST_STATE_QUEUED: "queued",
    daemon_pb2.REQUEST_STATE_PREFILL: "prefill",
    daemon_pb2.REQUEST_STATE_DECODE: "decode",
}


# --- to messages ------------------------------------------------------------------------------


def built(kind: Any, **values: Any) -> Any:
    """A message of these fields; None leaves one unset.

    Raises:
        RequestError: a value that its field cannot hold. The value is not quoted.
    """
    message = kind()
    for name, value in values.items():
        if value is None:
            continue
        try:
            part = kind(**{name: value})
        except (TypeError, ValueError) as error:  # ValueError: beyond the range, or text that is no UTF-8
            what = f"{kind.DESCRIPTOR.name}.{name}"
            raise RequestError(
                f"{what} has a value of the wrong type, beyond its range, or that UTF-8 cannot hold"
            ) from error
        message.MergeFrom(part)
    return message


def generate_request(
    prompt: str | Sequence[int], options: types.GenerationOptions
) -> inference_pb2.GenerateRequest:
    """A request for a prompt's continuation.

    Raises:
        RequestError: a value that its field cannot hold.
        TypeError: an option that there is not.
    """
    fields = _generation_fields(options)
    if isinstance(prompt, str):
        fields["text"] = prompt
    else:
        fields["tokens"] = token_ids(prompt)
    return cast(inference_pb2.GenerateRequest, built(inference_pb2.GenerateRequest, **fields))


def chat_request(
    messages: Iterable[types.Message], options: types.GenerationOptions
) -> inference_pb2.ChatRequest:
    """A request for a conversation's next turn.

    Raises:
        RequestError: a value that its field cannot hold, or a message without role or content.
        TypeError: an option that there is not.
    """
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError("a message needs the two keys 'role' and 'content', and no others")
        turns.append(built(inference_pb2.ChatMessage, **message))
    fields = _generation_fields(options)
    return cast(inference_pb2.ChatRequest, built(inference_pb2.ChatRequest, messages=turns, **fields))


def embed_request(inputs: str | Iterable[str | Sequence[int]], model: str) -> inference_pb2.EmbedRequest:
    """A request for vectors; a single text stands for a list of one."""
    given = [inputs] if isinstance(inputs, str) else list(inputs)
    parts = [
        built(inference_pb2.EmbedInput, text=one)
        if isinstance(one, str)
        else built(inference_pb2.EmbedInput, tokens=token_ids(one))
        for one in given
    ]
    return cast(inference_pb2.EmbedRequest, built(inference_pb2.EmbedRequest, inputs=parts, model=model))


def token_ids(tokens: Sequence[int]) -> inference_pb2.TokenIds:
    """Token ids as a message."""
    return cast(inference_pb2.TokenIds, built(inference_pb2.TokenIds, ids=tokens))


def _generation_fields(options: types.GenerationOptions) -> dict[str, Any]:
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
    sampling = built(inference_pb2.Sampling, **{name: options.get(name) for name in _SAMPLING})
    stop = options.get("stop")
    return {
        "model": options.get("model"),
        "sampling": sampling,
        "max_tokens": options.get("max_tokens"),
        "stop": [stop] if isinstance(stop, str) else stop,
        "logprobs": options.get("logprobs"),
        "mode": _mode(options.get("mode")),
        "quality": options.get("quality"),
        **_adapters(options.get("adapters")),
    }


def _mode(mode: str | None) -> inference_pb2.Mode | None:
    if mode is None:
        return None
    if not isinstance(mode, str) or mode not in _MODES:
        raise RequestError("mode is neither 'exact' nor 'relaxed'")
    return _MODES[mode]


def _adapters(adapters: Mapping[str, float] | Sequence[str] | None) -> dict[str, Any]:
    if adapters is None:
        return {}
    if isinstance(adapters, str) or not isinstance(adapters, Mapping | Iterable):
        raise RequestError("adapters is neither a list of names nor a mapping from names to strengths")
    pairs = adapters.items() if isinstance(adapters, Mapping) else [(name, None) for name in adapters]
    if not pairs:
        return {"no_adapters": True}
    return {
        "adapters": [
            built(inference_pb2.AdapterChoice, name=name, strength=strength) for name, strength in pairs
        ]
    }


# --- from messages ----------------------------------------------------------------------------


def chunk(message: inference_pb2.TextChunk) -> types.Chunk:
    """Newly decided text."""
    return types.Chunk(
        message.text,
        tuple(message.tokens),
        tuple(
            types.TokenLogprob(
                entry.token,
                entry.raw,
                entry.logprob,
                tuple(types.Alternative(one.token, one.raw, one.logprob) for one in entry.top),
            )
            for entry in message.logprobs
        ),
    )


def usage(message: inference_pb2.Finished) -> types.Usage:
    """What an answer took."""
    return types.Usage(
        finish_reason=_REASONS.get(message.reason, "stop"),
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
        reused_tokens=message.reused_tokens,
        generated_tokens=message.generated_tokens,
        queue_seconds=message.queue_seconds,
        prefill_seconds=message.prefill_seconds,
        decode_seconds=message.decode_seconds,
        contributions=_contributions(message.contributions) if message.HasField("contributions") else None,
    )


def _contributions(message: inference_pb2.ContributionCounts) -> types.ContributionCounts:
    return types.ContributionCounts(
        on_time=message.on_time,
        late=tuple(message.late),
        lost=message.lost,
        recomputed=message.recomputed,
        fell_back=message.fell_back,
    )


def embeddings(message: inference_pb2.EmbedResponse) -> types.Embeddings:
    """Vectors."""
    return types.Embeddings(tuple(tuple(one.values) for one in message.embeddings), message.prompt_tokens)


def model(message: models_pb2.Model) -> types.Model:
    """A model of the store."""
    return types.Model(message.name, message.source, message.sha256, message.added, message.loaded)


def models(message: models_pb2.ListModelsResponse) -> tuple[types.Model, ...]:
    """All models of the store."""
    return tuple(model(one) for one in message.models)


def description(message: models_pb2.DescribeModelResponse) -> types.ModelDescription:
    """What a model is."""
    return types.ModelDescription(
        title=message.title,
        architecture=message.architecture,
        parameters=message.parameters,
        quantization={part.type: part.share for part in message.quantization},
        context=message.context,
        layers=message.layers,
        embedding=message.embedding,
        vocabulary=message.vocabulary,
        tokenizer=message.tokenizer,
        chat_template=message.chat_template,
        licence=message.licence,
        size=message.size,
    )


def loaded_model(message: models_pb2.LoadedModel) -> types.LoadedModel:
    """A model in memory."""
    return types.LoadedModel(
        name=message.name,
        parameters=message.parameters,
        quantization=message.quantization,
        context=message.context,
        sequences=message.sequences,
        threads=message.threads,
        weight_bytes=message.weight_bytes,
        kv_bytes=message.kv_bytes,
    )


def pull_progress(message: models_pb2.PullModelResponse) -> types.PullProgress:
    """How far a download is."""
    return types.PullProgress(
        message.done_bytes,
        message.total_bytes if message.HasField("total_bytes") else None,
        message.notice,
        model(message.model) if message.HasField("model") else None,
    )


def status(message: daemon_pb2.GetStatusResponse) -> types.Status:
    """The daemon."""
    return types.Status(
        version=message.version,
        pid=message.pid,
        started=message.started,
        ready=message.ready,
        reason=message.reason,
        stopping=message.stopping,
        default_model=message.default_model,
        models=tuple(loaded_model(one) for one in message.models),
        requests=tuple(_request(one) for one in message.requests),
        queue_limit=message.queue_limit,
        finished=dict(message.finished),
        prompt_tokens=message.prompt_tokens,
        generated_tokens=message.generated_tokens,
        speed=tuple(message.speed),
        memory_bytes=message.memory_bytes,
        memory_available_bytes=message.memory_available_bytes,
        temperature=message.temperature if message.HasField("temperature") else None,
        cpu_percent=message.cpu_percent,
        cluster=cluster_report(message.cluster) if message.HasField("cluster") else None,
    )


def _request(message: daemon_pb2.Request) -> types.RequestStatus:
    return types.RequestStatus(
        id=message.id,
        client=message.client,
        model=message.model,
        state=_STATES.get(message.state, "queued"),
        prompt_tokens=message.prompt_tokens,
        generated_tokens=message.generated_tokens,
        seconds=message.seconds,
    )
