"""One model answering prompts on one machine: text in, streamed text out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from edge_runtime.engine.adapters import Adapters
from edge_runtime.engine.applied_adapters import NO_ADAPTERS, AppliedAdapters, Under, strengths_of
from edge_runtime.engine.architecture import Hyperparameters, check_tensors, read_hyperparameters
from edge_runtime.engine.backend import default_threads
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.chat_prompt import chat_prompt
from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.engine.decoding import Decoding, Piece
from edge_runtime.engine.generation import Generation
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.kv_tensors import KVType
from edge_runtime.engine.model import Model
from edge_runtime.engine.sampling import Sampler, SamplingParameters
from edge_runtime.engine.sequences import Places
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import ChatTemplateError, ContextOverflowError, RequestError

_DEFAULT_CONTEXT = 4096
_MAX_CONTEXT = 1 << 20
_ONE_THREAD_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded.

    Attributes:
        threads: CPU threads; None takes the physical cores, or one for a model below 32 MiB.
        context: tokens a sequence may hold; None takes the model's own, at most 4096.
        batch: prompt tokens computed at once.
        sequences: requests that can be in progress at the same time.
        weights: ``repack`` copies them to the fastest layout; ``mmap`` leaves them in the file, for
            devices short of memory.
        kv_type: how keys and values are kept: ``f16``, ``f32`` (twice the memory) or ``q8_0`` (half).
        ffn, head: False leaves the FFNs, or the LM head, in the file: whoever replaces
            `Engine.forward_pass` computes them.

    Raises:
        RequestError: a value out of range.
    """

    threads: int | None = None
    context: int | None = None
    batch: int = 512
    sequences: int = 1
    weights: Literal["repack", "mmap"] = "repack"
    kv_type: KVType = "f16"
    ffn: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        for name, highest in (
            ("threads", 512),
            ("context", _MAX_CONTEXT),
            ("batch", 4096),
            ("sequences", 256),
        ):
            value = getattr(self, name)
            if value is None and name in ("threads", "context"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
                raise RequestError(f"{name} = {value!r}; needed is a whole number from 1 to {highest}")
        if self.weights not in ("repack", "mmap"):
            raise RequestError(f"weights = {self.weights!r}; possible are 'repack' and 'mmap'")


def _threads_for(gguf: GGUFFile) -> int:
    """All physical cores, but one for a small model.

    Its tokens take less than a millisecond, most of which several threads would spend meeting after each
    operation; and where other programs run, each meeting may wait for one of them: the demo model then
    fell from 340 tokens/s with one thread to 6 with two.
    """
    size = sum(record.size for record in gguf.tensors.values())
    return 1 if size < _ONE_THREAD_BYTES else default_threads()


class ForwardPass(Protocol):
    """Runs a batch; its rows belong to these answers, in their order."""

    def __call__(self, batch: Batch, decodings: Sequence[Decoding], /) -> Result: ...


class Engine:
    """A loaded model, its tokenizer and its KV cache. Use it from one thread at a time.

    Load one with `Engine.load`; use it as a context manager or call `close`.

    Attributes:
        forward_pass: computes each batch of `advance`; the model itself, until somebody replaces it.
        applied: the adapters that answers can use.
    """

    def __init__(self, gguf: GGUFFile, model: Model, tokenizer: Tokenizer, options: EngineOptions) -> None:
        self.gguf = gguf
        self.model = model
        self.forward_pass: ForwardPass = lambda batch, decodings: model.forward(batch)
        self.tokenizer = tokenizer
        self.options = options
        self.context = model.cells.n_cells // options.sequences
        self.places = Places(model.cells)
        self.applied = AppliedAdapters(model)
        self._template: ChatTemplate | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        options: EngineOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Engine:
        """Open, check and load a GGUF file.

        Args:
            progress: called with the share loaded, 0 .. 1.

        Raises:
            ModelFileError: the file is damaged; UnsupportedModelError: the engine cannot run it.
            RequestError: a context longer than the model was trained for.
            OutOfMemoryError: it does not fit.
        """
        options = options or EngineOptions()
        gguf = GGUFFile(path)
        tokenizer = model = None
        try:
            hyperparameters = read_hyperparameters(gguf)
            check_tensors(gguf, hyperparameters)
            context = options.context or min(hyperparameters.n_ctx_train, _DEFAULT_CONTEXT)
            if context > hyperparameters.n_ctx_train:
                raise RequestError(
                    f"a context of {context} tokens was asked for; this model was trained for "
                    f"{hyperparameters.n_ctx_train}: choose that or less"
                )
            tokenizer = Tokenizer(gguf)
            model = Model(
                gguf,
                hyperparameters,
                n_cells=context * options.sequences,
                n_sequences=options.sequences,
                threads=options.threads or _threads_for(gguf),
                kv_type=options.kv_type,
                repack=options.weights == "repack",
                ffn=options.ffn,
                head=options.head,
                progress=progress,
            )
            return cls(gguf, model, tokenizer, options)
        except BaseException:
            for part in (model, tokenizer, gguf):
                if part is not None:
                    part.close()
            raise

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Shape of the model."""
        return self.model.hyperparameters

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self.model.threads

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own chat template; None where the file has none."""
        source = self.gguf.metadata.get("tokenizer.chat_template")
        if self._template is None and isinstance(source, str):
            bos, eos = (
                ""
                if token is None
                else self.tokenizer.token_bytes(token, special=True).decode(errors="replace")
                for token in (self.tokenizer.bos, self.tokenizer.eos)
            )
            self._template = ChatTemplate(source, bos, eos)
        return self._template

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParameters | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        adapters: Mapping[str, float] | None = NO_ADAPTERS,
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text, or token ids that are taken as they are.
            max_tokens: at most so many new tokens; None: until the model ends or the context is full.
            stop: strings at which the text ends; they are not part of it.
            adapters: of those that are applied, name -> strength; None: all of them, with strength 1.

        Raises:
            AdapterNotFoundError: an adapter that is not applied.
            ContextOverflowError: the prompt leaves no room for an answer.
            RequestError: a parameter out of range, an empty prompt, or all sequences are busy.
        """
        tokens = (
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        )
        limit = self.limit(tokens, max_tokens)
        self.applied.check(adapters)
        return Generation(
            self,
            tokens,
            sampling=sampling or SamplingParameters(),
            limit=limit,
            stop=stop,
            adapters=adapters,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: SamplingParameters | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        adapters: Mapping[str, float] | None = NO_ADAPTERS,
    ) -> Generation:
        """Answer a conversation of ``{"role": ..., "content": ...}`` messages; otherwise like `generate`.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses these messages.
        """
        tokens = self.chat_tokens(messages)
        return self.generate(tokens, sampling=sampling, max_tokens=max_tokens, stop=stop, adapters=adapters)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt that a conversation becomes.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses these messages.
        """
        template = self.chat_template
        if template is None:
            raise ChatTemplateError(
                "this model has no chat template; give it plain text to continue instead (edgert run --raw)"
            )
        return chat_prompt(template, self.tokenizer, messages)

    def decoding(
        self,
        tokens: Sequence[int],
        *,
        sampling: SamplingParameters | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        adapters: Mapping[str, float] | None = NO_ADAPTERS,
    ) -> Decoding:
        """An answer that `begin` and `advance` bring forward, alone or together with others.

        Raises:
            AdapterNotFoundError: an adapter that is not applied.
            ContextOverflowError: the prompt leaves no room for an answer.
            RequestError: a parameter out of range, or an empty prompt.
        """
        tokens = [int(token) for token in tokens]
        self.applied.check(adapters)
        return Decoding(
            self.tokenizer,
            tokens,
            sampling=sampling or SamplingParameters(),
            limit=self.limit(tokens, max_tokens),
            stop=stop,
            logprobs=logprobs,
            adapters=adapters,
        )

    def limit(self, tokens: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens an answer to this prompt may have.

        Raises:
            ContextOverflowError: the prompt leaves no room for an answer.
            RequestError: a parameter out of range, or an empty prompt.
        """
        if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
            raise RequestError(f"max_tokens = {max_tokens!r}; needed is a whole number of at least 1")
        self.check_prompt(tokens, room=1)
        room = self.context - len(tokens)
        return room if max_tokens is None else min(max_tokens, room)

    def check_prompt(self, tokens: Sequence[int], room: int) -> None:
        """Refuse a prompt that is empty, too long to leave `room` tokens, or no token ids.

        Raises:
            ContextOverflowError, RequestError: it is.
        """
        if not tokens:
            raise RequestError(
                "the prompt is empty and this model has no token that begins a text; give it some text"
            )
        if len(tokens) + room > self.context:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.context}, {room} of them "
                "for the answer; shorten the prompt or load the model with a larger context"
            )
        if min(tokens) < 0 or max(tokens) >= self.hyperparameters.n_vocab:
            highest = self.hyperparameters.n_vocab - 1
            raise RequestError(f"token ids {min(tokens)}..{max(tokens)}; this model's go from 0 to {highest}")

    # --- answers in progress ------------------------------------------------------------------

    def set_adapters(self, adapters: Adapters) -> None:
        """Apply these adapters, and no others, from the next answer on; call it between two tokens.

        An answer in progress ends with those that it began with, so no answer mixes two versions of one.

        Raises:
            RequestError: an adapter that does not fit the model; all stays as it was.
            OutOfMemoryError: they do not fit.
        """
        self.applied.replace(adapters, self._versions_in_use())
        self._forget_what_is_gone()

    def _versions_in_use(self) -> set[str]:
        return {version for place in self.places if place.busy for version, _ in place.under}

    def _forget_what_is_gone(self) -> None:
        """Empty places whose next token could not be computed with what their last ones were."""
        self.places.forget(lambda place: not self.applied.holds(place.under))

    def begin(self, decoding: Decoding) -> bool:
        """Give an answer a place in the KV cache; False if all are busy.

        Raises:
            AdapterNotFoundError: an adapter that it asks for is not applied any more.
        """
        place = self.places.claim(decoding.prompt, self.applied.resolve(decoding.adapters))
        if place is not None:
            decoding.begin(place)
        return place is not None

    def end(self, decoding: Decoding) -> None:
        """Free an answer's place, finished or not; safe to call twice."""
        if decoding.place is not None:
            self.places.release(decoding.place)
            decoding.place = None

    def advance(
        self, decodings: Sequence[Decoding], prefill: int | None = None
    ) -> list[tuple[Decoding, Piece]]:
        """One forward pass for several answers: a token for each that has its prompt behind it.

        Args:
            decodings: begun and not finished; those first in line have their prompts computed first.
            prefill: at most so many tokens of prompts; None takes the batch of the engine's options.

        Returns:
            those that have a new piece; an answer may be complete by it.
        """
        if self.applied.drop_unused(self._versions_in_use()):
            self._forget_what_is_gone()
        budget = self.options.batch if prefill is None else prefill
        shares: list[tuple[Decoding, list[int]]] = []
        for decoding in decodings:
            count = min(len(decoding.pending), budget) if decoding.is_prefilling else 1
            budget -= count if decoding.is_prefilling else 0
            if count:
                shares.append((decoding, decoding.pending[:count]))
        if not shares:
            return []
        tokens = [token for _, share in shares for token in share]
        positions: list[int] = []
        numbers: list[int] = []
        unders: list[tuple[Under, int]] = []
        wanted: list[int] = []
        due: list[Decoding] = []
        for decoding, share in shares:
            assert decoding.place is not None
            start = len(decoding.place.tokens)
            positions += range(start, start + len(share))
            numbers += [decoding.place.number] * len(share)
            unders.append((decoding.place.under, len(share)))
            if len(share) == len(decoding.pending):
                wanted.append(len(positions) - 1)
                due.append(decoding)
        batch = Batch(
            tokens,
            np.array(positions, np.int32),
            np.array(numbers, np.int32),
            wanted,
            adapters=strengths_of(unders),
        )
        result = self.forward_pass(batch, [decoding for decoding, _ in shares])
        for decoding, share in shares:
            decoding.computed(share)
        return [(decoding, decoding.take(row)) for decoding, row in zip(due, result.logits, strict=True)]

    def probe(self) -> int:
        """Really compute a token and return it, without disturbing what the KV cache holds.

        Raises:
            RequestError: all places are busy, so real answers are being computed.
        """
        place = max((p for p in self.places if not p.busy), key=lambda p: len(p.tokens), default=None)
        if place is None:
            raise RequestError("all sequences are busy: there is nothing to probe")
        tokens = place.tokens[-1:] or [self.tokenizer.bos or 0]
        position = max(len(place.tokens) - 1, 0)
        batch = Batch(tokens, [position], place.number, adapters=strengths_of([(place.under, 1)]))
        logits = self.forward_pass(batch, ()).logits[0]
        if not place.tokens:
            self.model.cells.remove(place.number)
        return int(Sampler(SamplingParameters(temperature=0), len(logits)).sample(logits))

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self.model.close()
        self.tokenizer.close()
        self.gguf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
