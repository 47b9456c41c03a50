"""What a client gives and gets: plain, frozen values. Times are in seconds, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from edge_runtime.cluster.report import ClusterReport
from edge_runtime.personalize.edit_report import EditCheck

FinishReason = Literal["stop", "length"]
Mode = Literal["exact", "relaxed"]
AdapterFormat = Literal["gguf", "peft"]
RequestState = Literal["queued", "prefill", "decode"]


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``, and what else the model's chat template knows.
        content: what was said.
    """

    role: str
    content: str


class GenerationOptions(TypedDict, total=False):
    """How an answer is made. What is left out, or None, means the daemon's default.

    Attributes:
        model: name in the store; by default the daemon's default model.
        max_tokens: at most so many; by default until the model ends or the context is full.
        temperature: 0 takes the likeliest token; 0 to 100, default 0.8.
        top_k: keep so many of the likeliest tokens; 0 keeps all; default 40.
        top_p: keep the likeliest tokens whose probabilities sum to this; above 0 to 1, default 0.95.
        min_p: drop tokens below this share of the likeliest one's probability; 0 to 1, default 0.05.
        repetition_penalty: logits of recent tokens are divided by it; 0.01 to 10, default 1 (off).
        frequency_penalty: taken from a logit for each recent occurrence; -2 to 2, default 0 (off).
        presence_penalty: taken once from the logit of each recent token; -2 to 2, default 0 (off).
        penalty_window: how many of the last tokens are recent; 0 none, -1 all, default 64.
        seed: 0 to 2^64-1; the same seed gives the same text; by default drawn anew.
        stop: strings at which the text ends, at most 16.
        logprobs: how many alternatives to report beside each token, 0 to 20; by default no
            log-probabilities at all.
        timeout: seconds until the request is given up, waiting included; by default the client's.
        mode: of a model that is spread over several devices: ``exact`` waits for each of them, ``relaxed``
            adds what comes late when it comes; by default the daemon's setting. One device alone is always
            exact.
        quality: what a relaxed answer may lose: 0.99 allows a perplexity 1 % worse; above 0 to 1, by default
            the daemon's setting.
        adapters: to answer with: names, or name -> strength (-10 to 10); ``()`` for none; by default all that
            are applied to the model.
    """

    model: str
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    penalty_window: int | None
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    timeout: float | None
    mode: Mode | None
    quality: float | None
    adapters: Mapping[str, float] | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come.

    Attributes:
        token: its id.
        raw: its bytes in UTF-8; a part of a character at times.
        logprob: natural logarithm of its probability.
    """

    token: int
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, before temperature, penalties and filters.

    Attributes:
        token: its id.
        raw: its bytes in UTF-8; a part of a character at times.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at that place, likeliest first.
    """

    token: int
    raw: bytes
    logprob: float
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly decided text; empty where a token only completes part of a character or of a stop string.

    Attributes:
        tokens: those behind the text.
        logprobs: one for each token, where they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ContributionCounts:
    """What became of other devices' contributions to an answer.

    A contribution is what one device computes of one layer for one token. One that came in parts counts as
    its parts, so these are no whole numbers.

    Attributes:
        on_time: there when the next layer began.
        late: late[k - 1] of them came k layers later, and were added then; the last number counts all that
            came later still.
        lost: never came within their token.
        recomputed: computed by the daemon's own device in another one's place.
        fell_back: whether a relaxed answer reached its quality's bound, and went on exactly.
    """

    on_time: float
    late: tuple[float, ...]
    lost: float
    recomputed: float
    fell_back: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took.

    Attributes:
        finish_reason: ``stop`` (the model ended, or a stop string came) or ``length``.
        seed: of the random draws; given in another request it repeats the answer.
        reused_tokens: those of the prompt that were in the KV cache already.
        queue_seconds, prefill_seconds, decode_seconds: until the work began, from then until the first
            token, from then until the last.
        contributions: of other devices; None where one computed alone.
    """

    finish_reason: FinishReason
    seed: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    contributions: ContributionCounts | None = None

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 where there was no second one."""
        if self.generated_tokens < 2 or self.decode_seconds <= 0:
            return 0.0
        return (self.generated_tokens - 1) / self.decode_seconds


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of length 1, one for each input, and the number of tokens read."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the store.

    Attributes:
        source: ``hf:...``, an address, ``file:...`` or ``built in``; empty where nobody recorded it.
        sha256: of the file; empty where unknown.
        added: seconds since 1970; 0 where unknown.
        loaded: whether it is in memory.
    """

    name: str
    source: str
    sha256: str
    added: float
    loaded: bool


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model is, from its file's header.

    Attributes:
        title: the model's own name; empty where it states none.
        parameters: number of weights.
        quantization: share of the weights by type, largest first.
        context: tokens the model was trained for.
        tokenizer: kind of vocabulary.
        chat_template: whether the file holds one.
        licence: as the file states it; empty where it does not.
        size: of the file.
    """

    title: str
    architecture: str
    parameters: int
    quantization: dict[str, float] = field(hash=False)
    context: int
    layers: int
    embedding: int
    vocabulary: int
    tokenizer: str
    chat_template: bool
    licence: str
    size: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        parameters: number of weights.
        quantization: the type that most weights have.
        context: tokens a request may have.
        sequences: requests computed together.
        threads: CPU threads.
        weight_bytes, kv_bytes: memory for the weights and for a full KV cache.
    """

    name: str
    parameters: int
    quantization: str
    context: int
    sequences: int
    threads: int
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a model is on its way into the store.

    Attributes:
        total_bytes: None where the source does not tell.
        notice: something for people; mostly empty.
        model: in the last one alone.
    """

    done_bytes: int
    total_bytes: int | None
    notice: str
    model: Model | None


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request that waits or runs.

    Attributes:
        client: a token's name or an address.
        seconds: since it arrived.
    """

    id: str
    client: str
    model: str
    state: RequestState
    prompt_tokens: int
    generated_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """The daemon at one moment.

    Attributes:
        started: seconds since 1970.
        ready, reason: whether a token was produced lately, and if not, why not.
        stopping: it finishes what runs and takes nothing new.
        requests: oldest first; those of others only for the scope ``admin``.
        queue_limit: requests that may wait.
        finished: outcome -> number of requests, since the start.
        prompt_tokens, generated_tokens: since the start.
        speed: tokens generated in each of the last 120 seconds, oldest first.
        memory_bytes, memory_available_bytes: of the daemon, and free on its device.
        temperature: of the processor in degrees Celsius; None where the device does not tell.
        cpu_percent: of all cores, since the last status.
        cluster: the devices that compute together; None where the daemon's belongs to no cluster. Where they
            are is told only to the scope ``admin``.
    """

    version: str
    pid: int
    started: float
    ready: bool
    reason: str
    stopping: bool
    default_model: str
    models: tuple[LoadedModel, ...]
    requests: tuple[RequestStatus, ...]
    queue_limit: int
    finished: dict[str, int] = field(hash=False)
    prompt_tokens: int
    generated_tokens: int
    speed: tuple[int, ...]
    memory_bytes: int
    memory_available_bytes: int
    temperature: float | None
    cpu_percent: float
    cluster: ClusterReport | None = None


class EditOptions(TypedDict, total=False):
    """How an edit is made. What is left out, or None, means the daemon's default.

    Attributes:
        model: name in the store; by default the daemon's default model.
        name: what to call the edit; by default ``edit-`` or ``forget-`` and its number.
        force: whether it is applied even if it fails its checks; by default not.
        steps: of the search at most.
        seconds: that it may take at most.
    """

    model: str
    name: str | None
    force: bool
    steps: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class EditEvaluation:
    """What the checks of an edit found when they were run again.

    Attributes:
        name: of the edit.
        checks: ``before`` is without this edit and with all others.
    """

    name: str
    checks: tuple[EditCheck, ...]


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """How far the preparation of a model for edits is.

    Attributes:
        share: how much is done, 0 to 1; 1 in the last one alone.
        layer: whose FFN edits will change, 0 is the first; in the last one alone, None before.
    """

    share: float
    layer: int | None = None
