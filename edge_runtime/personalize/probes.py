"""What a change of one layer's FFN output at a subject does to the texts about it, many changes at once.

At the edit layer ``L`` a subject's key ``k`` is the input of ``ffn_down`` at its last token. An edit adds
``s(k') * delta`` to the FFN's output of every token with input ``k'``, where ``s`` is a fixed linear readout
that is about one at the subject's keys and about nothing elsewhere. So all that a probe changes are the rows
from the subject on, from layer ``L + 1`` upward: everything before is computed once, and its keys and values
are shared by all probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.graph import Capture
from edge_runtime.errors import ContextOverflowError
from edge_runtime.personalize.contexts import Context
from edge_runtime.personalize.lens import lens_directions
from edge_runtime.personalize.workspace import Workspace

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Of some probes, in their shape.

    Attributes:
        nll: mean negative log-likelihood of each context's continuation, in nats.
        divergence: mean Kullback-Leibler divergence of the distributions over the
            continuation from the unedited model's, in nats; 0 of contexts that are to change.
        margin: the least lead, over the continuation's tokens, of its logit over the
            next best one; above 0 greedy decoding would say it.
    """

    nll: Doubles
    divergence: Doubles
    margin: Doubles


@dataclass(slots=True)
class _Base:
    """The unedited pass over one context: what its rows from the subject on start from."""

    hidden: Floats  # (n_rows, n_embd) residual stream before layer L + 1
    keys: Floats  # (n_rows, n_ff) inputs of ffn_down
    log_probabilities: Floats | None  # (n_target, n_vocab) over the continuation, where that is kept
    readout: Floats = field(default_factory=lambda: np.zeros(0, np.float32))  # (n_rows,)


class Probes:
    """Losses of many perturbed copies of some contexts.

    Args:
        workspace: whose KV cache this uses from now on; nothing else may.
        layer: the edit layer.

    Raises:
        ContextOverflowError: all contexts together do not fit the KV cache.
    """

    def __init__(self, workspace: Workspace, layer: int, contexts: Sequence[Context]) -> None:
        self.contexts = list(contexts)
        self.layer = layer
        self._workspace = workspace
        self._cells = workspace.model.cells
        self._upper = range(layer + 1, workspace.hyperparameters.n_layers)
        workspace.clear()
        try:
            self._bases = [self._base(number, context) for number, context in enumerate(self.contexts)]
        except ContextOverflowError as error:
            raise ContextOverflowError(
                f"the {len(self.contexts)} texts that the change is searched with have "
                f"{sum(len(context.tokens) for context in self.contexts)} tokens, too many to be held "
                f"at once ({self._cells.n_cells}); give the sentence with the fact alone"
            ) from error

    def _base(self, number: int, context: Context) -> _Base:
        end = len(context.tokens) - 1  # the last token is only predicted
        residual, activation = Capture("residual", self.layer + 1), Capture("ffn_activation", self.layer)
        result = self._workspace.forward(
            Batch(
                context.tokens[:end],
                np.arange(end, dtype=np.int32),
                number,
                np.arange(context.n_prompt - 1, end, dtype=np.int32),
                capture=[residual, activation],
            )
        )
        self._cells.remove(number, context.subject_end)
        rows = slice(context.subject_end, end)
        return _Base(
            result.captured[residual][rows],
            result.captured[activation][rows],
            _log_softmax(result.logits) if context.goal == "keep" else None,
        )

    @property
    def keys(self) -> Floats:
        """(n_contexts, n_ff) input of ffn_down at each context's subject."""
        return np.stack([base.keys[0] for base in self._bases])

    @property
    def n_rows(self) -> NDArray[np.int64]:
        """(n_contexts,) rows that a probe of each computes."""
        return np.array([len(base.hidden) for base in self._bases])

    @property
    def scale(self) -> float:
        """Typical length of a hidden state of the rows that an edit reaches."""
        return float(np.median([np.linalg.norm(base.hidden, axis=1).mean() for base in self._bases]))

    @property
    def width(self) -> int:
        """n_embd."""
        return int(self._bases[0].hidden.shape[1])

    def lens_directions(self) -> Doubles:
        """(n_contexts, n_embd) what the logit lens sees before each continuation, to make it likelier."""
        rows = [context.n_prompt - 1 - context.subject_end for context in self.contexts]
        hidden = np.stack([base.hidden[row] for base, row in zip(self._bases, rows, strict=True)])
        tokens = np.array([context.targets[0] for context in self.contexts])
        return lens_directions(self._workspace.gguf, self._workspace.hyperparameters, hidden, tokens)

    @property
    def readouts(self) -> list[Floats]:
        """For each context, (n_rows,) how strongly a change reaches its rows from the subject on."""
        return [base.readout for base in self._bases]

    def read_out(self, readout: Floats) -> None:
        """Let a probe's change reach each row as strongly as `readout` (n_ff,) says of its key."""
        for base in self._bases:
            base.readout = (base.keys @ readout).astype(np.float32)

    def everywhere(self, deltas: Floats) -> Losses:
        """(n_deltas, n_contexts) losses of each context with each of `deltas` (n_deltas, n_embd) added."""
        shape = (len(deltas), len(self.contexts))
        rows, contexts = (index.ravel() for index in np.indices(shape))
        found = self.losses(deltas[rows], contexts)
        return Losses(*(values.reshape(shape) for values in (found.nll, found.divergence, found.margin)))

    def losses(self, deltas: Floats, contexts: Sequence[int] | NDArray[np.integer]) -> Losses:
        """(n,) losses of context ``contexts[i]`` with ``deltas[i]``, of (n, n_embd), added."""
        count = len(contexts)
        found = Losses(np.zeros(count), np.zeros(count), np.zeros(count))
        for part in self._parts(contexts):
            self._compute(part, contexts, deltas, found)
        return found

    def _parts(self, contexts: Sequence[int] | NDArray[np.integer]) -> Iterator[range]:
        """What one forward pass takes."""
        start = rows = predicted = 0
        most = self._workspace.n_sequences - len(self.contexts)
        most_rows = min(self._workspace.rows, self._cells.n_free)
        for index, number in enumerate(contexts):
            count, targets = len(self._bases[number].hidden), len(self.contexts[number].targets)
            full = rows + count > most_rows or predicted + targets > self._workspace.logit_rows
            if index > start and (full or index - start == most):
                yield range(start, index)
                start, rows, predicted = index, 0, 0
            rows += count
            predicted += targets
        if start < len(contexts):
            yield range(start, len(contexts))

    def _compute(
        self, part: range, contexts: Sequence[int] | NDArray[np.integer], deltas: Floats, found: Losses
    ) -> None:
        first = len(self.contexts)
        hidden, positions, sequences, wanted = [], [], [], []
        row = 0
        for sequence, index in enumerate(part, first):
            number = contexts[index]
            context, base = self.contexts[number], self._bases[number]
            self._cells.copy(number, sequence)
            hidden.append(base.hidden + np.outer(base.readout, deltas[index]).astype(np.float32))
            n_rows = len(base.hidden)
            positions.append(np.arange(context.subject_end, context.subject_end + n_rows, dtype=np.int32))
            sequences.append(np.full(n_rows, sequence, np.int32))
            wanted.append(np.arange(row + context.n_prompt - 1 - context.subject_end, row + n_rows))
            row += n_rows
        logits = self._workspace.forward(
            Batch(
                None,
                np.concatenate(positions),
                np.concatenate(sequences),
                np.concatenate(wanted),
                hidden=np.concatenate(hidden),
                layers=self._upper,
            )
        ).logits
        row = 0
        for sequence, index in enumerate(part, first):
            self._cells.remove(sequence)
            number = contexts[index]
            targets = self.contexts[number].targets
            rows = logits[row : row + len(targets)]
            row += len(targets)
            found.nll[index], found.divergence[index], found.margin[index] = _measure(
                rows, targets, self._bases[number].log_probabilities
            )


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _measure(logits: Floats, targets: Sequence[int], before: Floats | None) -> tuple[float, float, float]:
    """Of the rows (n, n_vocab) that predict `targets`: nll, divergence from any `before`, least margin."""
    after = _log_softmax(logits)
    rows = np.arange(len(targets))
    own = after[rows, targets].copy()
    nll = -float(own.mean())
    divergence = 0.0
    if before is not None:
        divergence = float((np.exp(before) * (before - after)).sum(axis=-1).mean())
    after[rows, targets] = -np.inf
    margin = float((own - after.max(axis=-1)).min())
    return nll, divergence, margin
