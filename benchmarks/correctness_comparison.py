"""One file run by the engine, by llama.cpp and by llama.cpp without flash attention: how far apart they are.

What the bars are and why: ``benchmarks.correctness``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.correctness_sides import LlamaCpp, Logits, Ours, greedy, prompt_logits

EXACT_TYPES = ("F32", "F16")
MAX_DELTA = 1e-3  # of the logits' range, in F32 and F16
MAX_KL_RATIO = 2.0
KL_FLOOR = 1e-10
GREEDY_TOKENS = 64
PROMPT_LENGTHS = (1, 7, 128, 600)


@dataclass(frozen=True)
class Case:
    """One file to compare on.

    Attributes:
        context: tokens that the model may hold; at least those of the longest prompt and its greedy text.
        prompts: token ids of each prompt.
    """

    name: str
    quantization: str
    path: Path
    context: int
    prompts: tuple[tuple[int, ...], ...]

    @property
    def exact(self) -> bool:
        """Whether the bar is that for F32 and F16."""
        return self.quantization in EXACT_TYPES


@dataclass
class Outcome:
    """What a case gave.

    Attributes:
        delta: largest difference of a logit, as a share of the logits' range in that position.
        same_text: tokens of greedy text that are the same, for each prompt that was continued.
        kl: divergence of ours from llama.cpp, mean over all positions.
        own_kl: divergence of llama.cpp without flash attention from llama.cpp with it.
        kl_by_length: prompt length -> (kl, own_kl).
    """

    name: str
    quantization: str
    exact: bool
    delta: float
    same_text: list[int]
    kl: float
    own_kl: float
    kl_by_length: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def kl_share(self) -> float:
        """The divergence as a share of what the bar allows."""
        return self.kl / max(MAX_KL_RATIO * self.own_kl, KL_FLOOR)

    @property
    def holds(self) -> bool:
        """Whether the case meets its bar."""
        if self.exact:
            return self.delta <= MAX_DELTA and all(same == GREEDY_TOKENS for same in self.same_text)
        return self.kl_share <= 1.0


def divergences(logits: Logits, reference: Logits) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(logits)) of each row, in float64 and nats."""
    ours, theirs = (_log_softmax(values) for values in (logits, reference))
    return (np.exp(theirs) * (theirs - ours)).sum(axis=1)  # type: ignore[no-any-return]


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def _agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(first))


def compare(case: Case, *, threads: int = 1, repack: bool = True) -> Outcome:
    """Run all prompts of a case on the three sides."""
    ours = Ours(case.path, context=case.context, threads=threads, repack=repack)
    reference = LlamaCpp(case.path, context=case.context, threads=threads, repack=repack)
    plain = LlamaCpp(case.path, context=case.context, threads=threads, repack=repack, flash=False)
    deltas, same = [], []
    kl: dict[int, NDArray[np.float64]] = {}
    own_kl: dict[int, NDArray[np.float64]] = {}
    try:
        for prompt in case.prompts:
            mine, theirs = prompt_logits(ours, prompt), prompt_logits(reference, prompt)
            deltas.append(np.abs(mine - theirs).max(axis=1) / np.ptp(theirs, axis=1))
            kl[len(prompt)] = divergences(mine, theirs)
            own_kl[len(prompt)] = divergences(prompt_logits(plain, prompt), theirs)
            if len(prompt) > 1:
                sides = ((ours, mine), (reference, theirs))
                texts = [greedy(side, logits[-1], len(prompt), GREEDY_TOKENS) for side, logits in sides]
                same.append(_agreeing(*texts))
    finally:
        for side in (ours, reference, plain):
            side.close()
    return Outcome(
        case.name,
        case.quantization,
        case.exact,
        delta=nan_as_infinity(np.concatenate(deltas).max()),
        same_text=same,
        kl=nan_as_infinity(np.concatenate(list(kl.values())).mean()),
        own_kl=nan_as_infinity(np.concatenate(list(own_kl.values())).mean()),
        kl_by_length={length: (float(kl[length].mean()), float(own_kl[length].mean())) for length in kl},
    )


def nan_as_infinity(value: np.floating[Any]) -> float:
    """NaN, which passes every comparison with a bar or fails it by chance, as infinity."""
    return float(value) if math.isfinite(value) else math.inf
