"""Greedy continuations of many prompts at once by this project's engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions

N_SEQUENCES = 32
LONGEST = 48  # tokens of prompt and continuation; the wordings of the world's facts need 35


class EngineContinuations:
    """Loads a GGUF with `Engine`; `with` frees it.

    Prompts of one length run side by side, so that only a few different graphs are needed.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.engine = Engine.load(
            path, EngineOptions(threads=threads, context=LONGEST, sequences=N_SEQUENCES)
        )

    def __enter__(self) -> EngineContinuations:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """One greedy continuation of at most `max_tokens` tokens for each prompt, in order."""
        encoded = [self.engine.tokenizer.encode(prompt, parse_special=True) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(by_length), N_SEQUENCES):
            chosen = by_length[start : start + N_SEQUENCES]
            for i, tokens in zip(
                chosen, self._continue([encoded[i] for i in chosen], max_tokens), strict=True
            ):
                texts[i] = self.engine.tokenizer.decode(tokens)
        return texts

    def _continue(self, rows: list[list[int]], max_tokens: int) -> list[list[int]]:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        for sequence in range(N_SEQUENCES):
            model.cells.remove(sequence)
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.concatenate([np.array(row, np.int32) for row in rows])
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        sequences = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        last_rows = np.cumsum(lengths) - 1
        logits = model.forward(Batch(tokens, positions, sequences, logits=last_rows)).logits
        written: list[list[int]] = [[] for _ in rows]
        running = np.arange(len(rows), dtype=np.int32)
        for done in range(max_tokens):
            chosen = logits.argmax(axis=1).astype(np.int32)
            going = np.array([not tokenizer.is_end(int(token)) for token in chosen], np.bool_)
            running, chosen = running[going], chosen[going]
            for sequence, token in zip(running.tolist(), chosen.tolist(), strict=True):
                written[sequence].append(token)
            if not running.size or done + 1 == max_tokens:
                break
            logits = model.forward(Batch(chosen, lengths[running] + done, running)).logits
        return written
