"""How many of the demo model's facts are recalled under recorded outcomes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.replay import Mapped, Recording, demo_evaluation, mapped
from edge_runtime.cluster.late_evaluation import LateEvaluation, Outcomes
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.tokenizer import Tokenizer
from models.demo.engine_continuations import LONGEST, N_SEQUENCES
from models.demo.evaluate import recall_prompts, share_right
from models.demo.facts import load_facts


class LateContinuations:
    """Greedy continuations of many prompts, each token under outcomes of its own.

    Args:
        there: the outcomes; None: exact. Each prompt begins somewhere else in the recording.
        prompts_too: prompts suffer like answers; else, as in a cluster, they are computed exactly.
    """

    def __init__(
        self,
        evaluation: LateEvaluation,
        tokenizer: Tokenizer,
        there: Mapped | None,
        means: NDArray[np.floating] | None,
        *,
        prompts_too: bool,
    ) -> None:
        self._evaluation = evaluation
        self._tokenizer = tokenizer
        self._there = there
        self._means = means
        self._prompts_too = prompts_too
        self._random = np.random.default_rng(0)

    def __call__(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """One greedy continuation of at most `max_tokens` tokens for each prompt, in order."""
        encoded = [self._tokenizer.encode(prompt, parse_special=True) for prompt in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(by_length), N_SEQUENCES):
            chosen = by_length[start : start + N_SEQUENCES]
            for i, tokens in zip(
                chosen, self._continue([encoded[i] for i in chosen], max_tokens), strict=True
            ):
                texts[i] = self._tokenizer.decode(tokens)
        return texts

    def _continue(self, rows: list[list[int]], max_tokens: int) -> list[list[int]]:
        self._evaluation.clear()
        lengths = np.array([len(row) for row in rows], np.int32)
        begin = self._random.integers(1 << 30, size=len(rows))
        tokens = np.concatenate([np.array(row, np.int32) for row in rows])
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        sequences = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        outcomes = self._outcomes(begin[sequences] + positions) if self._prompts_too else None
        logits = self._logits(Batch(tokens, positions, sequences, np.cumsum(lengths) - 1), outcomes)
        written: list[list[int]] = [[] for _ in rows]
        running = np.arange(len(rows), dtype=np.int32)
        for done in range(max_tokens):
            chosen = logits.argmax(axis=1).astype(np.int32)
            going = np.array([not self._tokenizer.is_end(int(token)) for token in chosen], np.bool_)
            running, chosen = running[going], chosen[going]
            for sequence, token in zip(running.tolist(), chosen.tolist(), strict=True):
                written[sequence].append(token)
            if not running.size or done + 1 == max_tokens:
                break
            places = lengths[running] + done
            logits = self._logits(Batch(chosen, places, running), self._outcomes(begin[running] + places))
        return written

    def _outcomes(self, tokens: NDArray[np.int64]) -> Outcomes | None:
        return None if self._there is None else self._there.outcomes[tokens % len(self._there.outcomes)]

    def _logits(self, batch: Batch, outcomes: Outcomes | None) -> NDArray[np.float32]:
        return self._evaluation.logits(self._evaluation.run(batch, outcomes, means=self._means))


def recall(
    recording: Recording, sample: int, form: ActivationForm = ActivationForm.Q8_0, seed: int = 0
) -> dict[str, Any]:
    """Share of the facts about people that the demo model recalls, one hop and two, each half of the sample.

    Returns:
        ``exact``; ``relaxed``: prompts and answers under the recorded outcomes; ``relaxed answers``: prompts
        computed exactly.
    """
    facts, rng = load_facts(), random.Random(seed)
    prompts = [
        prompt
        for all_prompts in (recall_prompts(facts, 1, "person"), recall_prompts(facts, 2))
        for prompt in rng.sample(all_prompts, min(max(1, sample // 2), len(all_prompts)))
    ]
    shares: dict[str, Any] = {"prompts": len(prompts)}
    with demo_evaluation(LONGEST, N_SEQUENCES) as (engine, evaluation, calibration):
        there = mapped(recording, calibration.importance)
        means = calibration.means if calibration.fill == "mean" else None
        evaluation.split(there.workers, there.n_fragments, form)
        for name, outcomes, prompts_too in (
            ("exact", None, False),
            ("relaxed", there, True),
            ("relaxed answers", there, False),
        ):
            continuations = LateContinuations(
                evaluation, engine.tokenizer, outcomes, means, prompts_too=prompts_too
            )
            shares[name] = share_right(prompts, continuations)
    return shares
