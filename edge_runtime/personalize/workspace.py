"""Forward passes beside a loaded model's answers: its weights, a KV cache and graphs of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.model import Model
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

_CELLS = 1024
_SEQUENCES = 256
_ROWS = 128
_LEAST_ROWS = 16
_LOGITS = 3 << 19  # that are held at once, twice: by the kernels and by numpy


class Workspace:
    """Where an edit computes.

    Args:
        engine: loaded; its weights are shared, its KV cache and its answers are not touched.
        n_cells: tokens that the KV cache holds, all sequences together.
        rows: tokens computed at once; more need more memory and let answers wait longer.
        turn: held during each forward pass, so that others can compute in between.

    Attributes:
        rows_computed: tokens that went through all layers; one through half of them counts half.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        n_cells: int = _CELLS,
        rows: int = _ROWS,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.gguf = engine.gguf
        self.tokenizer = engine.tokenizer
        self.hyperparameters = engine.hyperparameters
        self.rows = rows
        self.rows_computed = 0.0
        self._turn = turn
        self._strengths: dict[str, float] = {}
        self.model = Model(
            engine.gguf,
            engine.hyperparameters,
            n_cells=n_cells,
            n_sequences=_SEQUENCES,
            threads=engine.threads,
            weights=engine.model.weights,
        )

    @property
    def n_sequences(self) -> int:
        """Sequences that can be kept apart."""
        return self.model.cells.n_sequences

    @property
    def logit_rows(self) -> int:
        """Tokens whose logits are computed at once."""
        return max(_LEAST_ROWS, _LOGITS // self.hyperparameters.n_vocab)

    @property
    def nbytes(self) -> int:
        """Memory that computing here takes beside the engine's own: KV cache and intermediate values."""
        return self.model.kv_bytes + self.model.backend.graph_bytes

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what is not the engine's."""
        self.model.close()

    def apply(self, adapters: Mapping[str, Sequence[LowRank]]) -> None:
        """Compute with these adapters, all switched on, and no others from now on.

        Raises:
            RequestError: one does not fit the model.
        """
        if adapters or self._strengths:
            self.model.set_adapters(adapters)
        self._strengths = dict.fromkeys(adapters, 1.0)

    def forward(self, batch: Batch) -> Result:
        """Run one batch, with the adapters of `apply`.

        Raises:
            ContextOverflowError, RequestError: as `Model.forward`.
        """
        if self._strengths:
            batch = replace(batch, adapters=self._strengths)
        layers = batch.layers or range(self.hyperparameters.n_layers)
        self.rows_computed += len(batch.positions) * len(layers) / self.hyperparameters.n_layers
        with self._turn():
            return self.model.forward(batch)

    def clear(self) -> None:
        """Empty the KV cache."""
        for sequence in range(self.n_sequences):
            if self.model.cells.length(sequence):
                self.model.cells.remove(sequence)

    # --- text ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n_tokens: int,
        *,
        temperature: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> list[list[int]]:
        """Continue prompts, several at once.

        Args:
            n_tokens: of each continuation at most; it is shorter where the model ends.
            temperature: 0 takes the likeliest token; otherwise `generator` draws.

        Returns:
            the new tokens of each prompt, without the one that ends.
        """
        self.clear()
        room = self.model.cells.n_cells // 2  # memory of cells that nothing used is none
        found: list[list[int]] = []
        waiting = [list(prompt) for prompt in prompts]
        while waiting:
            taken, cells = 0, 0
            for prompt in waiting[: min(self.n_sequences, self.rows)]:
                cells += len(prompt) + n_tokens
                if taken and cells > room:
                    break
                taken += 1
            found += self._generate(waiting[:taken], n_tokens, temperature, generator)
            waiting = waiting[taken:]
        return found

    def surprise(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Negative log-likelihood, in nats, of each text after its first token."""
        self.clear()
        found: list[float] = []
        for part in self._batches(texts, min(self.rows, self.logit_rows)):
            batch = _whole([texts[number] for number in part], range(len(part)))
            logits = self.forward(batch).logits
            row = 0
            for sequence, number in enumerate(part):
                tokens = np.array(texts[number], np.int32)
                rows = logits[row : row + len(tokens) - 1]
                row += len(tokens)
                top = rows.max(axis=1)
                norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
                found.append(float((norm - rows[np.arange(len(rows)), tokens[1:]]).sum()))
                self.model.cells.remove(sequence)
        return found

    def _batches(self, texts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
        """Numbers of texts that are computed at once, with `most` tokens."""
        part: list[int] = []
        rows = 0
        for number, text in enumerate(texts):
            if part and (rows + len(text) > most or len(part) == self.n_sequences):
                yield part
                part, rows = [], 0
            part.append(number)
            rows += len(text)
        if part:
            yield part

    def _generate(
        self,
        prompts: list[list[int]],
        n_tokens: int,
        temperature: float,
        generator: np.random.Generator | None,
    ) -> list[list[int]]:
        logits = self._prefill(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        for step in range(n_tokens):
            chosen = _choose(logits, temperature, generator)
            going = []
            for row, sequence in enumerate(live):
                if not self.tokenizer.is_end(int(chosen[row])):
                    found[sequence].append(int(chosen[row]))
                    going.append(row)
            live = [live[row] for row in going]
            if not live or step == n_tokens - 1:
                break
            positions = [len(prompts[sequence]) + step for sequence in live]
            batch = Batch(chosen[going], np.array(positions, np.int32), np.array(live, np.int32))
            logits = self.forward(batch).logits
        self.clear()
        return found

    def _prefill(self, prompts: list[list[int]]) -> Floats:
        """Logits (n_prompts, n_vocab) after each prompt; equal prompts are computed once."""
        first_of: dict[tuple[int, ...], int] = {}
        for number, prompt in enumerate(prompts):
            first_of.setdefault(tuple(prompt), number)
        firsts = list(first_of.values())
        logits: dict[int, Floats] = {}
        for part in self._batches([prompts[number] for number in firsts], self.rows):
            numbers = [firsts[index] for index in part]
            lengths = [len(prompts[number]) for number in numbers]
            batch = _whole(
                [prompts[number] for number in numbers], numbers, np.cumsum(lengths, dtype=np.int32) - 1
            )
            logits.update(zip(numbers, self.forward(batch).logits, strict=True))
        for number, prompt in enumerate(prompts):
            self.model.cells.copy(first_of[tuple(prompt)], number)
        return np.stack([logits[first_of[tuple(prompt)]] for prompt in prompts])


def _whole(
    texts: Sequence[Sequence[int]], sequences: Sequence[int], logits: NDArray[np.int32] | None = None
) -> Batch:
    """Whole texts, each in its sequence."""
    lengths = [len(text) for text in texts]
    return Batch(
        np.concatenate([np.asarray(text, np.int32) for text in texts]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.repeat(np.asarray(sequences, np.int32), lengths),
        logits,
    )


def _choose(logits: Floats, temperature: float, generator: np.random.Generator | None) -> NDArray[np.int32]:
    """The next token of each row."""
    if not temperature:
        likeliest: NDArray[np.int32] = logits.argmax(axis=1).astype(np.int32)
        return likeliest
    if generator is None:
        raise RequestError(f"temperature = {temperature} needs a random generator")
    scaled = logits / temperature
    # Gumbel's maximum is a draw from the softmax.
    noise = generator.gumbel(size=scaled.shape)
    chosen: NDArray[np.int32] = (scaled + noise).argmax(axis=1).astype(np.int32)
    return chosen
