"""From logits to the next token: penalties, top-k, top-p, min-p, temperature, then one draw.

The order and the meaning of each step are llama.cpp's. Top-k, top-p and min-p each keep a leading part
of the candidates sorted by logit, so together they keep the shortest of the three, and the temperature
acts only on what is left.

The same seed and the same logits give the same tokens on every CPU: random numbers come from PCG64's
integers, and everything after them uses only operations that IEEE 754 rounds in one way (addition,
multiplication, division, comparison, powers of two), in a fixed order. ``exp`` of the C library and of
numpy differ in their last bit from one processor to the next, so :func:`_exp` is built from those.
"""

import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EdgeRuntimeError, RequestError

_SEED_LIMIT = 2**64
_MAX_TEMPERATURE = 100.0
_MIN_REPETITION_PENALTY = 0.01
_MAX_REPETITION_PENALTY = 10.0
_MAX_ADDITIVE_PENALTY = 2.0  # the range that the field's HTTP APIs allow
_MAX_WINDOW = 2**31 - 1
_TOP_P_FIRST_SORT = 256  # candidates sorted first where nothing but top-p limits them; eightfold each time

# ln 2 in two parts, the first with 21 trailing zero bits, so that k * _LN2_HIGH is exact for |k| < 2048.
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
_EXP_COEFFICIENTS = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))
_EXP_ZERO = -708.0  # below it exp leaves float64's normal range: taken as 0


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the shortest leading part whose probabilities sum to at least this; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one's probability; 0 drops none.
        repetition_penalty: positive logits of recent tokens are divided by it, others multiplied; 1 is off.
        frequency_penalty: subtracted once for each recent occurrence of a token; 0 is off.
        presence_penalty: subtracted once from each recent token; 0 is off.
        penalty_window: how many of the last tokens, the prompt's included, are recent; 0 switches all three
            penalties off, -1 counts every token.
        seed: 0 to 2^64-1; None lets the sampler draw one.

    Raises:
        RequestError: a value of the wrong type or out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_real("temperature", 0.0, _MAX_TEMPERATURE)
        self._check_integer("top_k", 0, _MAX_WINDOW)
        self._check_real("top_p", 0.0, 1.0, low_included=False)
        self._check_real("min_p", 0.0, 1.0)
        self._check_real("repetition_penalty", _MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY)
        self._check_real("frequency_penalty", -_MAX_ADDITIVE_PENALTY, _MAX_ADDITIVE_PENALTY)
        self._check_real("presence_penalty", -_MAX_ADDITIVE_PENALTY, _MAX_ADDITIVE_PENALTY)
        self._check_integer("penalty_window", -1, _MAX_WINDOW)
        if self.seed is not None:
            self._check_integer("seed", 0, _SEED_LIMIT - 1)

    @property
    def penalizes(self) -> bool:
        """Whether recent tokens change the logits at all."""
        neutral = (1.0, 0.0, 0.0)
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return self.penalty_window != 0 and penalties != neutral

    def _check_real(self, name: str, low: float, high: float, *, low_included: bool = True) -> None:
        value: Any = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        # Compared as it is: that is exact for integers of any size, which float() may not take.
        if not is_number or not (low <= value if low_included else low < value) or not value <= high:
            lower = "from" if low_included else "above"
            raise RequestError(f"{name} is {_shown(value)}; it must be a number {lower} {low:g} to {high:g}")
        object.__setattr__(self, name, float(value))

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value: Any = getattr(self, name)
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or not low <= value <= high:
            raise RequestError(f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}")
        object.__setattr__(self, name, int(value))


class Sampler:
    """Chooses tokens for one sequence.

    Args:
        parameters: how to choose.
        n_vocab: length of the logits.

    Attributes:
        seed: the seed in use, drawn from the system where the parameters name none.
    """

    def __init__(self, parameters: SamplingParameters, n_vocab: int) -> None:
        self.parameters = parameters
        self.n_vocab = n_vocab
        self.seed = int.from_bytes(os.urandom(8), "little") if parameters.seed is None else parameters.seed
        self._random = np.random.PCG64(self.seed)
        window = parameters.penalty_window
        self._recent: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        self._window: float = math.inf if window < 0 else window

    def accept(self, token: int) -> None:
        """Count a token of the prompt or of the answer for the penalties.

        Raises:
            RequestError: no token of this vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise RequestError(f"token {token} is outside the vocabulary of {self.n_vocab} tokens")
        if not self.parameters.penalizes:
            return
        self._counts[token] += 1
        if self._window == math.inf:
            return
        self._recent.append(token)
        if len(self._recent) > self._window:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def accept_all(self, tokens: Sequence[int]) -> None:
        """Count several tokens, oldest first."""
        for token in tokens:
            self.accept(token)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token.

        Args:
            logits: float32 (n_vocab,), left as they are. NaN counts as -inf.

        Raises:
            EdgeRuntimeError: no logit is above -inf, so nothing can be chosen.
        """
        logits = self._checked(logits)
        if self.parameters.temperature == 0.0:
            return int(logits.argmax())
        tokens, weights = self._candidates(logits)
        cumulative = np.cumsum(weights)
        uniform = (int(self._random.random_raw()) >> 11) * 2.0**-53
        # uniform <= 1 - 2^-53, so the product is below the total even after rounding: the index is in range.
        return int(tokens[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])

    def candidates(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens that may be drawn next, and their probabilities.

        Returns:
            tokens (n,) and probabilities (n,), which sum to 1; likeliest first unless every token of the
            vocabulary is a candidate, which are then in the vocabulary's order.
        """
        logits = self._checked(logits)
        if self.parameters.temperature == 0.0:
            return np.array([logits.argmax()], dtype=np.int64), np.ones(1)
        tokens, weights = self._candidates(logits)
        return tokens, weights / np.cumsum(weights)[-1]

    def _checked(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits after the penalties, without NaN and +inf, at least one of them above -inf."""
        if logits.shape != (self.n_vocab,):
            raise EdgeRuntimeError(f"logits have shape {logits.shape}; the sampler needs ({self.n_vocab},)")
        if not math.isfinite(float(logits.max())):
            largest = float(np.finfo(np.float32).max)
            logits = np.nan_to_num(logits, nan=-math.inf, posinf=largest, neginf=-math.inf)
        if self._counts:
            logits = self._penalized(logits)
        if logits.max() == -math.inf:
            raise EdgeRuntimeError(
                f"none of the {self.n_vocab} logits is a number above -inf, so no token can be chosen; "
                "the model file is damaged or its weights overflow"
            )
        return logits

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy with the penalties applied to every recent token."""
        parameters = self.parameters
        tokens = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float64, count=len(self._counts))
        recent = logits[tokens].astype(np.float64)
        penalty = parameters.repetition_penalty
        recent = np.where(recent <= 0.0, recent * penalty, recent / penalty)
        recent -= counts * parameters.frequency_penalty + parameters.presence_penalty
        # Back to float32 within its range: a logit near the largest float must not become inf.
        largest = float(np.finfo(np.float32).max)
        penalized = logits.copy()
        penalized[tokens] = np.where(recent == -math.inf, recent, np.clip(recent, -largest, largest))
        return penalized

    def _candidates(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens that survive top-k, top-p and min-p, and their weights exp((logit - maximum) / T)."""
        parameters = self.parameters
        top_k = parameters.top_k
        if 0 < top_k < self.n_vocab:
            tokens = _largest(logits, top_k)
            differences = _below_maximum(logits[tokens])
            weights = _exp(differences)
            total = float(np.cumsum(weights)[-1])
        elif parameters.top_p < 1.0 or parameters.min_p > 0.0:
            everything = _exp(_below_maximum(logits))
            total = float(np.cumsum(everything)[-1])
            tokens = self._leading(logits, everything, total)
            differences = _below_maximum(logits[tokens])
            weights = everything[tokens]
        else:
            differences = _below_maximum(logits)
            return np.arange(self.n_vocab), self._tempered(differences)
        kept = len(tokens)
        if parameters.top_p < 1.0:
            reached = np.searchsorted(np.cumsum(weights), parameters.top_p * total, side="left")
            kept = min(kept, int(reached) + 1)
        if parameters.min_p > 0.0:
            kept = min(kept, max(1, int(np.count_nonzero(weights >= parameters.min_p))))
        return tokens[:kept], self._tempered(differences[:kept])

    def _tempered(self, differences: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):  # a difference beyond float64's range is -inf, whose weight is 0
            return _exp(differences / self.parameters.temperature)

    def _leading(
        self, logits: NDArray[np.float32], weights: NDArray[np.float64], total: float
    ) -> NDArray[np.int64]:
        """The likeliest tokens in order, at least as many as top-p or min-p will keep of all of them."""
        parameters = self.parameters
        if parameters.min_p > 0.0:
            tokens = np.flatnonzero(weights >= parameters.min_p)
            return tokens[np.argsort(-logits[tokens], kind="stable")]
        count = _TOP_P_FIRST_SORT
        while count < self.n_vocab:
            tokens = _largest(logits, count)
            if np.cumsum(weights[tokens])[-1] >= parameters.top_p * total:
                return tokens
            count *= 8
        return np.argsort(-logits, kind="stable")


def _largest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first, equal ones by index. 0 < count < len(logits).

    The logits fall into groups; the count-th largest of the groups' maxima is a lower bound for the count-th
    largest logit, so one pass for the maxima and one comparison leave few to sort. That takes a fifth of
    the time of ``argpartition`` over 128k logits, and unlike it settles ties in one way everywhere.
    """
    n_groups = min(max(1024, 4 * count), len(logits))
    rows = len(logits) // n_groups
    maxima = logits[: rows * n_groups].reshape(rows, n_groups).max(axis=0)
    bound = np.partition(maxima, n_groups - count)[n_groups - count]
    tokens = np.flatnonzero(logits >= bound)
    return tokens[np.argsort(-logits[tokens], kind="stable")[:count]]


def _below_maximum(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each logit minus the largest one, in float64: at most 0."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide


def _exp(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of values <= 0, within 1 ulp or so, with the same bits on every CPU.

    exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) by its Taylor series to the 13th
    power, whose remainder is below 5e-18. No fused multiply-add can slip in between numpy's operations.
    """
    exponents = np.maximum(exponents, _EXP_ZERO)
    powers = np.rint(exponents * _LOG2_E)
    remainders = exponents - powers * _LN2_HIGH
    remainders -= powers * _LN2_LOW
    series = np.full_like(remainders, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        series *= remainders
        series += coefficient
    values = np.ldexp(series, powers.astype(np.int32))
    values[exponents == _EXP_ZERO] = 0.0
    return values


def _shown(value: object) -> str:
    """A refused value for a message: short whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"  # repr of a huge integer may itself be refused
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
