"""What late and lost contributions cost a model on a text, against the exact model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.calibration_text import Window
from edge_runtime.cluster.late_evaluation import LateEvaluation, Outcomes

Floats = NDArray[np.float32]
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Condition:
    """What happens to the contributions.

    Attributes:
        outcomes: of all rows alike, (1, n_layers, n_parts), or a function of a window and its number.
        means: what stands for contributions until they come, as in `LateEvaluation.run`.
        start: all layers before this one are on time.
    """

    outcomes: Outcomes | Callable[[Window, int], Outcomes]
    means: NDArray[np.floating] | None = None
    start: int = 0

    def of(self, window: Window, number: int) -> Outcomes:
        """Outcomes of a window's rows."""
        return self.outcomes if isinstance(self.outcomes, np.ndarray) else self.outcomes(window, number)


@dataclass(frozen=True, slots=True)
class Cost:
    """Per token, of the scored ones.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the exact model's next-token distribution, nats.
        increase: of the logarithm of the perplexity.
    """

    divergence: float
    increase: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Of several conditions on one text.

    Attributes:
        perplexity: of the exact model.
        n_tokens: that were scored.
    """

    of: tuple[Cost, ...]
    perplexity: float
    n_tokens: int


def costs(
    evaluation: LateEvaluation,
    text: Sequence[Window],
    conditions: Sequence[Condition],
    progress: Progress = lambda share: None,
) -> Costs:
    """Measure conditions; the groups are split as `evaluation.split` was told.

    Args:
        progress: called with the share done, 0 to 1.
    """
    n_layers = evaluation.shape.n_layers
    totals = np.zeros((len(conditions), 2))
    exact_loss, n_tokens, done = 0.0, 0, 0
    work = (n_layers + sum(n_layers - condition.start for condition in conditions)) * len(text)
    for number, window in enumerate(text):
        evaluation.clear()
        streams: list[Floats] = []
        exact = log_shares(evaluation.logits(evaluation.run(window.batch, residuals=streams)))
        wanted = (np.arange(len(window.targets)), window.targets)
        exact_loss -= exact[wanted].sum(dtype=np.float64)
        n_tokens += len(window.targets)
        done += n_layers
        for row, condition in zip(totals, conditions, strict=True):
            hidden = evaluation.run(
                window.batch,
                condition.of(window, number),
                means=condition.means,
                start=condition.start,
                residuals=streams if condition.start else None,
            )
            found = log_shares(evaluation.logits(hidden))
            row += _divergence(exact, found), (exact[wanted] - found[wanted]).sum(dtype=np.float64)
            done += n_layers - condition.start
            progress(done / work)
    found_costs = tuple(Cost(*row) for row in (totals / n_tokens).tolist())
    return Costs(found_costs, math.exp(exact_loss / n_tokens), n_tokens)


def log_shares(logits: Floats) -> Floats:
    """Logarithms of the probabilities that logits (n_rows, n_vocab) stand for; in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def _divergence(exact: Floats, found: Floats) -> float:
    """Sum over rows of the divergence of `found` from `exact`, both logarithms of probabilities."""
    rows = (np.exp(exact) * (exact - found)).sum(axis=1, dtype=np.float64)
    return float(np.maximum(rows, 0.0).sum())  # rounding can make a tiny one negative
