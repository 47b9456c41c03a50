"""One answer between two forward passes: what is to be computed next, and what its logits decide."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.applied_adapters import NO_ADAPTERS
from edge_runtime.engine.sampling import Sampler, SamplingParameters
from edge_runtime.engine.sequences import Place
from edge_runtime.engine.text_stream import TextStream
from edge_runtime.engine.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class TokenLogprob(NamedTuple):
    """A token's log-probability before temperature, penalties and filters.

    Attributes:
        token: its id.
        raw: its bytes; a part of a character at times.
        logprob: natural logarithm.
        top: the likeliest tokens (id, bytes, logprob), likeliest first.
    """

    token: int
    raw: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


class Piece(NamedTuple):
    """Newly decided text. Empty where a token only completes part of a character or of a stop string."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Decoding:
    """The state of one answer.

    Args:
        prompt: token ids.
        limit: at most so many new tokens.
        logprobs: None for none, else how many alternatives to report beside each token.
        adapters: name -> strength; None: all that are applied when it begins. It ends with the versions that
            it began with.

    Attributes:
        place: where its keys and values lie, once the engine has given it one.
        pending: tokens still to be computed: the rest of the prompt, then always the last token.
        finish_reason: ``stop`` or ``length`` once it is complete.
        prompt_tokens, reused_tokens, generated_tokens: counts.
        prefill_seconds, decode_seconds: until the first token and after it, from the first call of `begin`.
        forwarding: what the engine's `forward_pass` keeps about it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        *,
        sampling: SamplingParameters,
        limit: int,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        adapters: Mapping[str, float] | None = NO_ADAPTERS,
    ) -> None:
        self._tokenizer = tokenizer
        self._sampler = Sampler(sampling, tokenizer.n_vocab)
        self._stream = TextStream(stop)
        self._limit = limit
        self._logprobs = logprobs
        self._started = self._first_token = 0.0
        self.prompt = prompt
        self.adapters = adapters
        self.place: Place | None = None
        self.pending: list[int] = []
        self.seed = self._sampler.seed
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = len(prompt)
        self.reused_tokens = 0
        self.generated_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.forwarding: object = None

    @property
    def is_prefilling(self) -> bool:
        """Whether the prompt is not computed yet."""
        return not self._first_token

    def begin(self, place: Place) -> None:
        """Start in a place of the KV cache."""
        self.place = place
        self.reused_tokens = len(place.tokens)
        self.pending = self.prompt[self.reused_tokens :]
        self._started = time.perf_counter()
        for token in self.prompt:
            self._sampler.accept(token)

    def computed(self, tokens: list[int]) -> None:
        """These leading tokens of `pending` are in the KV cache now."""
        assert self.place is not None
        self.place.tokens += tokens
        del self.pending[: len(tokens)]

    def take(self, logits: NDArray[np.float32]) -> Piece:
        """Decide the next token from the logits (n_vocab,) of the last one, and go on with it."""
        token = self._sampler.sample(logits)
        now = time.perf_counter()
        if not self._first_token:
            self._first_token = now
            self.prefill_seconds = now - self._started
        self.decode_seconds = now - self._first_token
        if self._tokenizer.is_end(token):
            self.finish_reason = "stop"
            return Piece(self._stream.finish(), ())
        logprobs = () if self._logprobs is None else (self._logprob(token, logits),)
        self._sampler.accept(token)
        self.generated_tokens += 1
        self.pending = [token]
        text = self._stream.push(self._tokenizer.token_bytes(token))
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif self.generated_tokens >= self._limit:
            self.finish_reason = "length"
            text += self._stream.finish()
        return Piece(text, (token,), logprobs)

    def _logprob(self, token: int, logits: NDArray[np.float32]) -> TokenLogprob:
        shifted = logits.astype(np.float64) - float(logits.max())
        normalised = shifted - np.log(np.exp(shifted).sum())
        count = self._logprobs or 0
        likeliest = np.argpartition(-normalised, count)[:count] if count else np.empty(0, np.intp)
        likeliest = likeliest[np.argsort(-normalised[likeliest], kind="stable")]
        top = tuple((int(t), self._bytes(int(t)), float(normalised[t])) for t in likeliest)
        return TokenLogprob(token, self._bytes(token), float(normalised[token]), top)

    def _bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token, special=True)
