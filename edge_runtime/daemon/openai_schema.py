"""Requests in the form of OpenAI's API, read strictly: what would change the answer is never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edge_runtime.daemon.http_errors import ParameterError
from edge_runtime.daemon.json_fields import Fields, checked_text, kind_of
from edge_runtime.daemon.requests import MAX_LOGPROBS, MAX_STOPS, GenerationRequest
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import RequestError

MAX_PROMPTS = 64  # of one request for completions
MAX_MESSAGES = 4096
_MAX_TOKENS = 2**31 - 1
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for completions; chats have none
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# They say who asks, how it is billed or stored, or what could be sent ahead: the answer is the same.
_HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
)
# the name here, and what else clients call it
_REAL_SAMPLING = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
_REPETITION = ("repetition_penalty", "repeat_penalty")
_WINDOW = ("penalty_window", "repeat_last_n")
_MODES: dict[str, Literal["", "exact", "relaxed"]] = {"": "", "exact": "exact", "relaxed": "relaxed"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for text.

    Attributes:
        requests: one for each choice.
        stream: whether the answer is sent as it comes.
        include_usage: whether a stream ends with what it took.
    """

    requests: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class WantedEmbeddings:
    """A request for embeddings; ``base64`` rather than numbers, ``dimensions`` if the client insists."""

    inputs: tuple[Prompt, ...]
    model: str
    base64: bool
    dimensions: int | None
    timeout: float | None


def chat_request(values: Mapping[str, Any], client: str) -> Wanted:
    """Read a body of ``/v1/chat/completions``.

    Raises:
        ParameterError, RequestError: it cannot be served as it is.
    """
    fields = Fields(values)
    messages = _messages(fields.take("messages"))
    limit, newer = _token_limit(fields, "max_tokens"), _token_limit(fields, "max_completion_tokens")
    if limit is not None and newer is not None and limit != newer:
        raise ParameterError(
            f"max_tokens is {limit} and max_completion_tokens {newer}; give one of them", "max_tokens"
        )
    _refuse_tools(fields)
    fields.refuse("modalities", lambda value: value == ["text"], "the models here write text")
    fields.refuse("audio", _is_nothing, "the models here write text")
    fields.refuse("reasoning_effort", _is_nothing, "leave it out")
    fields.refuse("verbosity", _is_nothing, "leave it out")
    fields.refuse("web_search_options", _is_nothing, "this daemon searches nothing")
    wants_logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise ParameterError("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (top or 0) if wants_logprobs else None
    return _wanted(
        fields, client, messages=(messages,), max_tokens=newer if limit is None else limit, logprobs=logprobs
    )


def completion_request(values: Mapping[str, Any], client: str) -> Wanted:
    """Read a body of ``/v1/completions``.

    Raises:
        ParameterError, RequestError: it cannot be served as it is.
    """
    fields = Fields(values)
    prompts = _prompts(fields.take("prompt"), "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise ParameterError(f"{len(prompts)} prompts; possible are {MAX_PROMPTS} in one request", "prompt")
    limit = _token_limit(fields, "max_tokens")
    fields.refuse("best_of", lambda value: value == 1 and value is not True, "one answer is made; give 1")
    fields.refuse("echo", lambda value: value is False, "the answer is sent without its prompt")
    fields.refuse("suffix", lambda value: value == "", "text is continued, not filled in")
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    return _wanted(
        fields,
        client,
        prompts=prompts,
        max_tokens=_DEFAULT_COMPLETION_TOKENS if limit is None else limit,
        logprobs=logprobs,
    )


def embedding_request(values: Mapping[str, Any]) -> WantedEmbeddings:
    """Read a body of ``/v1/embeddings``.

    Raises:
        ParameterError: it cannot be served as it is.
    """
    fields = Fields(values)
    inputs = _prompts(fields.take("input"), "input")
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ParameterError("encoding_format is neither 'float' nor 'base64'", "encoding_format")
    wanted = WantedEmbeddings(
        inputs=inputs,
        model=fields.text("model") or "",
        base64=encoding == "base64",
        dimensions=fields.integer("dimensions", 1, 2**31 - 1),
        timeout=_timeout(fields),
    )
    fields.ignore(*_HARMLESS)
    fields.end()
    return wanted


def _wanted(
    fields: Fields,
    client: str,
    *,
    prompts: tuple[Prompt | None, ...] = (None,),
    messages: tuple[tuple[dict[str, str], ...] | None, ...] = (None,),
    max_tokens: int | None,
    logprobs: int | None,
) -> Wanted:
    """What chats and completions have in common."""
    fields.refuse("n", lambda value: value == 1 and value is not True, "one answer is made; give 1")
    fields.refuse("logit_bias", _is_nothing, "leave it out")
    model = fields.text("model") or ""
    sampling = _sampling(fields)
    stop = _stops(fields.take("stop"))
    timeout = _timeout(fields)
    mode, quality = _mode(fields), _quality(fields)
    adapters = _adapters(fields.take("adapters"))
    stream = fields.boolean("stream")
    options = fields.take("stream_options")
    fields.ignore(*_HARMLESS)
    fields.end()
    include_usage = False
    if options is not None:
        if not stream:
            raise ParameterError("stream_options needs stream to be true", "stream_options")
        streaming = Fields(options, "stream_options")
        include_usage = streaming.boolean("include_usage")
        streaming.ignore("include_obfuscation")
        streaming.end()
    requests = tuple(
        GenerationRequest(
            model=model,
            prompt=prompt,
            messages=conversation,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            timeout=timeout,
            client=client,
            mode=mode,
            quality=quality,
            adapters=adapters,
        )
        for prompt in prompts
        for conversation in messages
    )
    return Wanted(requests, stream, include_usage)


def _is_nothing(value: object) -> bool:
    """Whether a value asks for nothing: an empty object, array or string, or false."""
    return value is False or value in ({}, [], "")


def _token_limit(fields: Fields, name: str) -> int | None:
    return fields.integer(name, 1, _MAX_TOKENS)


def _timeout(fields: Fields) -> float | None:
    """Seconds after which the client wants no answer any more; not part of OpenAI's API."""
    seconds = fields.number("timeout")
    if seconds is not None and not seconds > 0:
        raise ParameterError(f"timeout is {seconds:g}; needed is a number of seconds above 0", "timeout")
    return seconds


def _mode(fields: Fields) -> Literal["", "exact", "relaxed"]:
    """What to wait for where a model is spread over several devices; not part of OpenAI's API."""
    mode = fields.text("mode") or ""
    if mode not in _MODES:
        raise ParameterError("mode is neither 'exact' nor 'relaxed'", "mode")
    return _MODES[mode]


def _quality(fields: Fields) -> float | None:
    """What a relaxed answer may lose; not part of OpenAI's API."""
    quality = fields.number("quality")
    if quality is not None and not 0 < quality <= 1:
        raise ParameterError(f"quality is {quality:g}; needed is a number above 0, at most 1", "quality")
    return quality


def _adapters(values: object) -> tuple[tuple[str, float], ...] | None:
    """Adapters by name, or name and strength; not part of OpenAI's API."""
    if values is None:
        return None
    if not isinstance(values, list):
        raise ParameterError(
            f"adapters is {kind_of(values)}; needed is an array of names, or of objects with name and "
            "strength",
            "adapters",
        )
    return tuple(_adapter(value, f"adapters[{place}]") for place, value in enumerate(values))


def _adapter(value: object, path: str) -> tuple[str, float]:
    if isinstance(value, str):
        return checked_text(value, path), 1.0
    fields = Fields(value, path)
    name, strength = fields.text("name"), fields.number("strength")
    fields.end()
    if name is None:
        raise ParameterError(f"{path}.name is absent; needed is the name of an adapter", f"{path}.name")
    return name, 1.0 if strength is None else strength


def _refuse_tools(fields: Fields) -> None:
    advice = "ask for the text and read it yourself"
    for name in ("tools", "functions"):
        fields.refuse(name, _is_nothing, advice)
    for name in ("tool_choice", "function_call"):
        fields.refuse(name, lambda value: value in ("none", "auto"), advice)
    fields.refuse(
        "response_format",
        lambda value: value == {"type": "text"},
        'the answer is plain text ({"type": "text"})',
    )


def _sampling(fields: Fields) -> SamplingParameters:
    """How tokens are chosen; the engine's defaults where the client says nothing."""
    chosen: dict[str, Any] = {name: fields.number(name) for name in _REAL_SAMPLING}
    chosen["top_k"] = fields.integer("top_k", 0, 2**31 - 1)
    chosen[_REPETITION[0]] = _one_of(*(fields.number(name) for name in _REPETITION))
    chosen[_WINDOW[0]] = _one_of(*(fields.integer(name, -1, 2**31 - 1) for name in _WINDOW))
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    chosen["seed"] = None if seed is None else seed % 2**64
    try:
        return SamplingParameters(**{name: value for name, value in chosen.items() if value is not None})
    except RequestError as error:
        param = str(error).split(" ", 1)[0]  # its messages begin with the parameter's name
        raise ParameterError(str(error), param) from None


def _one_of(first: Any, second: Any) -> Any:
    return second if first is None else first


def _stops(value: object) -> tuple[str, ...]:
    if value is None or value == []:
        return ()
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MAX_STOPS:
        raise ParameterError(f"stop has {len(stops)} strings; possible are {MAX_STOPS}", "stop")
    return tuple(checked_text(stop, "stop") for stop in stops)


def _prompts(value: object, name: str) -> tuple[Prompt, ...]:
    """A text, a list of texts, the tokens of one text, or a list of those."""
    if isinstance(value, str):
        return (checked_text(value, name),)
    if not isinstance(value, list) or not value:
        found = "an empty array" if value == [] else "absent" if value is None else kind_of(value)
        needed = "a string, an array of strings, an array of tokens, or an array of such arrays"
        raise ParameterError(f"{name} is {found}; needed is {needed}", name)
    if isinstance(value[0], int):
        return (_tokens(value, name),)
    return tuple(
        _tokens(one, name) if isinstance(one, list) else checked_text(one, f"{name}[{place}]")
        for place, one in enumerate(value)
    )


def _tokens(values: list[object], name: str) -> tuple[int, ...]:
    """Token ids; whether the model has them is for the engine to say."""
    for place, token in enumerate(values):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise ParameterError(
                f"{name}[{place}] is {kind_of(token)}; needed is a token, a whole number of at least 0", name
            )
    return tuple(token for token in values if isinstance(token, int))


def _messages(values: object) -> tuple[dict[str, str], ...]:
    if not isinstance(values, list) or not values:
        found = "empty" if values == [] else "absent" if values is None else kind_of(values)
        raise ParameterError(f"messages is {found}; needed is an array of at least one message", "messages")
    if len(values) > MAX_MESSAGES:
        raise ParameterError(f"{len(values)} messages; possible are {MAX_MESSAGES}", "messages")
    return tuple(_message(value, f"messages[{place}]") for place, value in enumerate(values))


def _message(value: object, path: str) -> dict[str, str]:
    """One message. Clients send answers back as they came, with fields that are null or empty."""
    fields = Fields(value, path)
    role = fields.text("role")
    if role not in _ROLES:
        raise ParameterError(
            f"{path}.role is none of {', '.join(_ROLES)}; tools and functions are not supported",
            f"{path}.role",
        )
    content = _content(fields.take("content"), f"{path}.content")
    for name in ("tool_calls", "function_call", "audio"):
        fields.refuse(name, _is_nothing, "send messages of text")
    fields.ignore("name", "refusal", "annotations")
    fields.end()
    return {"role": _ROLES[role], "content": content}


def _content(value: object, path: str) -> str:
    """A message's text: a string, or parts of type ``text``, which follow each other."""
    if not isinstance(value, list):
        return checked_text(value, path)
    parts = []
    for place, one in enumerate(value):
        part = Fields(one, f"{path}[{place}]")
        if part.text("type") != "text":
            raise ParameterError(
                f"{path}[{place}].type is not 'text'; the models here read nothing else",
                f"{path}[{place}].type",
            )
        parts.append(checked_text(part.take("text"), f"{path}[{place}].text"))
        part.ignore("cache_control")
        part.end()
    return "".join(parts)
