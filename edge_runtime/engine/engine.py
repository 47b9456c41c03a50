"""One model answering prompts on one machine: text in, streamed text out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from edge_runtime.engine.architecture import Hyperparameters, check_tensors, read_hyperparameters
from edge_runtime.engine.backend import default_threads
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.chat_template import ChatTemplate
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.kv_tensors import KVType
from edge_runtime.engine.model import Model
from edge_runtime.engine.sampling import Sampler, SamplingParameters
from edge_runtime.engine.text_stream import TextStream
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import ChatTemplateError, ContextOverflowError, RequestError

_DEFAULT_CONTEXT = 4096
_MAX_CONTEXT = 1 << 20
_ONE_THREAD_BYTES = 32 << 20
_WORTH_SHARING = 32  # tokens of another sequence's prefix that make sharing its cells worth while

FinishReason = Literal["stop", "length"]


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

    Raises:
        RequestError: a value out of range.
    """

    threads: int | None = None
    context: int | None = None
    batch: int = 512
    sequences: int = 1
    weights: Literal["repack", "mmap"] = "repack"
    kv_type: KVType = "f16"

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


class Piece(NamedTuple):
    """Newly decided text. Empty where a token only completes part of a character or of a stop string."""

    text: str
    tokens: tuple[int, ...]


@dataclass(slots=True)
class _Sequence:
    """A place in the KV cache and the tokens whose keys and values it holds."""

    number: int
    tokens: list[int]
    busy: bool = False


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differs[0]) if differs.size else length


def _threads_for(gguf: GGUFFile) -> int:
    """All physical cores, but one for a small model.

    Its tokens take less than a millisecond, most of which several threads would spend meeting after each
    operation; and where other programs run, each meeting may wait for one of them: the demo model then
    fell from 340 tokens/s with one thread to 6 with two.
    """
    size = sum(record.size for record in gguf.tensors.values())
    return 1 if size < _ONE_THREAD_BYTES else default_threads()


class Engine:
    """A loaded model, its tokenizer and its KV cache. Use it from one thread at a time.

    Load one with `Engine.load`; use it as a context manager or call `close`.
    """

    def __init__(self, gguf: GGUFFile, model: Model, tokenizer: Tokenizer, options: EngineOptions) -> None:
        self._gguf = gguf
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.context = model.cells.n_cells // options.sequences
        self._sequences = [_Sequence(number, []) for number in range(options.sequences)]
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
        source = self._gguf.metadata.get("tokenizer.chat_template")
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
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text, or token ids that are taken as they are.
            max_tokens: at most so many new tokens; None: until the model ends or the context is full.
            stop: strings at which the text ends; they are not part of it.

        Raises:
            ContextOverflowError: the prompt leaves no room for an answer.
            RequestError: a parameter out of range, an empty prompt, or all sequences are busy.
        """
        tokens = (
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        )
        if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
            raise RequestError(f"max_tokens = {max_tokens!r}; needed is a whole number of at least 1")
        if not tokens:
            raise RequestError(
                "the prompt is empty and this model has no token that begins a text; give it some text"
            )
        if len(tokens) >= self.context:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.context}, one of them for "
                "the answer; shorten the prompt or load the model with a larger context"
            )
        if min(tokens) < 0 or max(tokens) >= self.hyperparameters.n_vocab:
            highest = self.hyperparameters.n_vocab - 1
            raise RequestError(f"token ids {min(tokens)}..{max(tokens)}; this model's go from 0 to {highest}")
        return Generation(self, tokens, sampling or SamplingParameters(), max_tokens, stop)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: SamplingParameters | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Answer a conversation of ``{"role": ..., "content": ...}`` messages; otherwise like `generate`.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses these messages.
        """
        template = self.chat_template
        if template is None:
            raise ChatTemplateError(
                "this model has no chat template; give it plain text to continue instead (edgert run --raw)"
            )
        text = template.render(messages)
        written = bool(template.bos_token) and text.startswith(template.bos_token)
        tokens = self.tokenizer.encode(text, add_bos=not written, parse_special=True)
        return self.generate(tokens, sampling=sampling, max_tokens=max_tokens, stop=stop)

    def _claim(self, tokens: Sequence[int]) -> tuple[_Sequence, int]:
        """A free sequence and how many leading tokens of the prompt its cells now hold."""
        free = [sequence for sequence in self._sequences if not sequence.busy]
        if not free:
            raise RequestError(
                f"all {len(self._sequences)} sequences of this engine are busy; close one first"
            )
        # The last token is always computed: its logits are what generation starts from.
        usable = tokens[:-1]
        shared = {seq.number: _common_prefix(usable, seq.tokens) for seq in self._sequences}
        chosen = max(free, key=lambda sequence: (shared[sequence.number], -len(sequence.tokens)))
        best = max(self._sequences, key=lambda sequence: shared[sequence.number])
        reused = shared[chosen.number]
        if shared[best.number] >= reused + _WORTH_SHARING:
            reused = shared[best.number]
            self.model.cells.copy(best.number, chosen.number, reused)
        else:
            self.model.cells.remove(chosen.number, reused)
        chosen.tokens = list(tokens[:reused])
        chosen.busy = True
        return chosen, reused

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self.model.close()
        self.tokenizer.close()
        self._gguf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Generation:
    """An answer in progress: iterate over its pieces, or take the whole `text`. Closing it stops the work.

    Attributes:
        finish_reason: ``stop`` (the model ended, or a stop string came), ``length`` (max_tokens reached or
            context full); None until then.
        seed: of the random draws; the same seed gives the same text.
        prompt_tokens, reused_tokens, generated_tokens: counts; reused ones were in the KV cache already.
        prefill_seconds, decode_seconds: time until the first token, and after it.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: list[int],
        sampling: SamplingParameters,
        max_tokens: int | None,
        stop: Sequence[str],
    ) -> None:
        self._engine = engine
        self._sampler = Sampler(sampling, engine.hyperparameters.n_vocab)
        self._stream = TextStream(stop)
        room = engine.context - len(tokens)
        self._limit = room if max_tokens is None else min(max_tokens, room)
        self.seed = self._sampler.seed
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens = len(tokens)
        self.reused_tokens = 0
        self.generated_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._pieces = self._run(tokens)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def text(self) -> str:
        """The rest of the text, as a whole."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop; the sequence is free for the next request."""
        self._pieces.close()

    def _run(self, tokens: list[int]) -> Generator[Piece, None, None]:
        sequence, self.reused_tokens = self._engine._claim(tokens)
        try:
            started = time.perf_counter()
            for token in tokens:
                self._sampler.accept(token)
            logits = self._prefill(sequence, tokens)
            token = self._sampler.sample(logits)
            now = time.perf_counter()
            self.prefill_seconds, decoding = now - started, now
            while not self._engine.tokenizer.is_end(token):
                self._sampler.accept(token)
                self.generated_tokens += 1
                text = self._stream.push(self._engine.tokenizer.token_bytes(token))
                self.decode_seconds = time.perf_counter() - decoding
                if self._stream.stopped:
                    self.finish_reason = "stop"
                elif self.generated_tokens >= self._limit:
                    self.finish_reason = "length"
                    text += self._stream.finish()
                yield Piece(text, (token,))
                if self.finish_reason:
                    return
                token = self._sampler.sample(self._forward(sequence, [token], logits=[0]))
            self.finish_reason = "stop"
            self.decode_seconds = time.perf_counter() - decoding
            rest = self._stream.finish()
            if rest:
                yield Piece(rest, ())
        finally:
            sequence.busy = False

    def _prefill(
        self, sequence: _Sequence, tokens: list[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        batch = self._engine.options.batch
        for start in range(len(sequence.tokens), len(tokens), batch):
            chunk = tokens[start : start + batch]
            last = start + batch >= len(tokens)
            logits = self._forward(sequence, chunk, logits=[len(chunk) - 1] if last else [])
        return logits

    def _forward(
        self, sequence: _Sequence, tokens: list[int], logits: list[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        start = len(sequence.tokens)
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        result = self._engine.model.forward(Batch(tokens, positions, sequence.number, logits))
        sequence.tokens += tokens
        return result.logits[0] if logits else np.empty(0, np.float32)
