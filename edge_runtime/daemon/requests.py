"""What the APIs ask of the daemon's core, and what comes back; no wire format is known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edge_runtime.engine.applied_adapters import check_strengths
from edge_runtime.engine.decoding import FinishReason, TokenLogprob
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import RequestError

MAX_LOGPROBS = 20  # alternatives a token, as in the field's HTTP APIs
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ADAPTERS = 256

Message = Mapping[str, str]

__all__ = [
    "Chunk",
    "ContributionCounts",
    "Embeddings",
    "FinishReason",
    "GenerationRequest",
    "Message",
    "TokenLogprob",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for text. Either a prompt or messages.

    Attributes:
        model: name in the store; empty for the daemon's default.
        prompt: text, or token ids taken as they are.
        messages: a conversation of ``{"role": ..., "content": ...}``.
        max_tokens: at most so many; None: until the model ends or the context is full.
        stop: strings at which the text ends; they are not part of it.
        logprobs: None for none; else how many alternatives to report beside each token, 0 to 20.
        timeout: seconds from arrival until the request is given up; None for the daemon's limit.
        client: between whom the queue is fair: a token's name or an address.
        mode: of a model spread over a cluster: ``exact`` waits for every device, ``relaxed`` adds what comes
            late when it comes; empty for the daemon's setting. One device alone is always exact.
        quality: of a relaxed request: 0.99 allows a perplexity 1 % worse; None for the daemon's setting.
        adapters: (name, strength) of those to answer with; None for all that are applied, () for none.

    Raises:
        RequestError: neither or both of prompt and messages, or a value out of range.
    """

    model: str = ""
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    timeout: float | None = None
    client: str = ""
    mode: Literal["", "exact", "relaxed"] = ""
    quality: float | None = None
    adapters: tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("a request needs either a prompt or messages")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens = {self.max_tokens}; needed is a whole number of at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs = {self.logprobs}; possible are 0 to {MAX_LOGPROBS}")
        if self.timeout is not None and not self.timeout > 0:
            raise RequestError(f"timeout = {self.timeout}; needed is a number of seconds above 0")
        if self.mode not in ("", "exact", "relaxed"):
            raise RequestError(f"mode = {self.mode!r}; possible are 'exact' and 'relaxed'")
        if self.quality is not None and not 0 < self.quality <= 1:
            raise RequestError(f"quality = {self.quality}; needed is a number above 0, at most 1")
        if len(self.stop) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARACTERS for s in self.stop):
            raise RequestError(
                f"{len(self.stop)} stop strings; possible are {MAX_STOPS} of 1 to {MAX_STOP_CHARACTERS} "
                "characters"
            )
        if self.adapters is not None:
            self._check_adapters(self.adapters)

    @staticmethod
    def _check_adapters(adapters: tuple[tuple[str, float], ...]) -> None:
        strengths = dict(adapters)
        if len(adapters) > MAX_ADAPTERS or len(strengths) < len(adapters):
            raise RequestError(
                f"{len(adapters)} adapters, {len(strengths)} of them different; possible are {MAX_ADAPTERS}, "
                "each once"
            )
        check_strengths(strengths)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly decided text; empty where a token only completes part of a character or of a stop string."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ContributionCounts:
    """What became of other devices' contributions to an answer; parts of one count as parts.

    Attributes:
        on_time: there when the next layer began.
        late: late[k - 1] of them came k layers later, and were added then.
        lost: never came within their token.
        recomputed: computed here in another device's place.
        fell_back: the request reached its quality's bound and went on exactly.
    """

    on_time: float
    late: tuple[float, ...]
    lost: float
    recomputed: float
    fell_back: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, known when it is complete.

    Attributes:
        finish_reason: ``stop`` (the model ended, or a stop string came) or ``length``.
        seed: of the random draws; the same seed gives the same text.
        prompt_tokens, reused_tokens, generated_tokens: counts; reused ones were in the KV cache already.
        queue_seconds, prefill_seconds, decode_seconds: until the work began, until the first token, after it.
        contributions: of other devices; None where this one computed alone.
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


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of unit length, one for each input, and the number of tokens read."""

    vectors: list[list[float]]
    prompt_tokens: int
