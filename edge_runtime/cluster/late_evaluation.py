"""What a model says when what others compute for it comes late, or never.

Each token of a batch has its own outcomes. The residual stream is a sum, so a contribution of layer l that
is late by k is taken out of it and put back in before layer l + 1 + k; keys and values in between are those
of a stream that lacks it, as they would be in a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.activations import ActivationForm, decode, encode
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.group_slices import GroupSlices, PartitionShape
from edge_runtime.engine.layer_steps import LayerSteps
from edge_runtime.engine.model import Model
from edge_runtime.engine.shares import Share, ShareComputer
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]
Outcomes = NDArray[np.int8]
"""int8 (n_rows, n_layers, n_parts), or one row for all: `ON_TIME`, late by so many layers, or `LOST`.

Parts are fragments of workers' contributions: worker 0's fragments, then worker 1's. What would come
after the last layer never does.
"""

Groups = tuple[int, ...]

ON_TIME, LOST = 0, -1
MAX_LATE = 127  # that an outcome can say

_FRAGMENT_UNIT = 32  # values at whose multiples contributions are cut on the wire
_MAX_WORKERS = 256
_MAX_FRAGMENTS = 64


class LateEvaluation:
    """One model whose neuron groups are split among this device and imagined workers.

    Args:
        model: loaded without its FFNs (``ffn=False``), which are held in shares here.
        slices: of the model's file.

    Attributes:
        steps: the model, layer by layer.
        computer: what the shares are computed with; for callers that want shares of their own.

    Raises:
        OutOfMemoryError: ggml could not start.
    """

    def __init__(self, model: Model, slices: GroupSlices) -> None:
        self.model = model
        self.shape = slices.shape
        self.slices = slices
        self.steps = LayerSteps(model)
        self.computer = ShareComputer(slices.shape, model.backend)
        self._shares: dict[tuple[int, Groups], Share] = {}
        self._workers: list[list[Share | None]] = []

    def split(
        self,
        workers: Sequence[Sequence[Sequence[int]]],
        n_fragments: int = 1,
        form: ActivationForm = ActivationForm.F32,
    ) -> None:
        """Give each worker its groups; all others are computed here and never late. Needed before `run`.

        Args:
            workers: [worker][layer] -> neuron groups, which may be none.
            n_fragments: parts into which a contribution is cut.
            form: in which contributions with outcomes travel.

        Raises:
            RequestError: groups that the model does not have, or that two workers share.
            OutOfMemoryError: the shares do not fit.
        """
        shape = self.shape
        if len(workers) > _MAX_WORKERS or not 1 <= n_fragments <= _MAX_FRAGMENTS:
            raise RequestError(
                f"{len(workers)} workers with {n_fragments} fragments; possible are {_MAX_WORKERS} and "
                f"1 to {_MAX_FRAGMENTS}"
            )
        nodes = [_of_layer(layer, workers, shape) for layer in range(shape.n_layers)]
        wanted = {(layer, groups) for layer, of in enumerate(nodes) for groups in of if groups}
        self._workers = []
        for key in self._shares.keys() - wanted:  # first, so that memory never holds both
            self._shares.pop(key).close()
        self._workers = [
            [self._hold(layer, groups) if groups else None for groups in of] for layer, of in enumerate(nodes)
        ]
        units = -(-shape.n_embd // _FRAGMENT_UNIT)
        size = -(-units // n_fragments) * _FRAGMENT_UNIT
        # (n_embd,) the fragment that each value travels in.
        self._fragment = np.minimum(np.arange(shape.n_embd) // size, n_fragments - 1)
        self.n_fragments = n_fragments
        self.n_parts = len(workers) * n_fragments
        self._form = form

    def _hold(self, layer: int, groups: Groups) -> Share:
        share = self._shares.get((layer, groups))
        if share is None:
            content = {group: self.slices.group(layer, group) for group in groups}
            share = self._shares[layer, groups] = self.computer.share(layer, content)
        return share

    # --- running ------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all sequences; needed before a batch that does not continue the last one."""
        for sequence in range(self.model.cells.n_sequences):
            self.model.cells.remove(sequence)

    def run(
        self,
        batch: Batch,
        outcomes: Outcomes | None = None,
        *,
        means: NDArray[np.floating] | None = None,
        start: int = 0,
        residuals: list[Floats] | None = None,
    ) -> Floats:
        """The residual stream after the last layer, (n_rows, n_embd); `logits` goes on from there.

        Args:
            batch: tokens, as `LayerSteps.begin` takes them.
            outcomes: None: the exact model, everything on time and as it was computed.
            means: (n_layers, n_groups, n_embd), what stands for a contribution until it comes, summed over
                its groups; None: nothing does.
            start: the first layer that is run; the stream before it is taken from `residuals`.
            residuals: with start = 0, the streams before each layer are appended here.

        Raises:
            RequestError: as `LayerSteps.begin`, or outcomes of another shape.
            ContextOverflowError: the KV cache has too few free cells.
        """
        if not self._workers:
            raise RequestError("the groups must be split before anything is run")
        if start and (residuals is None or not start < len(residuals)):
            raise RequestError(f"to start at layer {start}, the residual stream before it is needed")
        x = self.steps.begin(batch)
        self._check(outcomes, len(x))
        if start and residuals is not None:
            x = residuals[start].copy()
        owed: dict[int, Floats] = {}
        for layer in range(start, self.shape.n_layers):
            if residuals is not None and not start:
                residuals.append(x.copy())
            residual, ffn_input = self.steps.attention(layer, x)
            np.copyto(x, residual)
            own, *others = self._workers[layer]
            if own is not None:
                x += self.computer.compute(own, ffn_input)
            for worker, share in enumerate(others):
                if share is not None:
                    contribution = self.computer.compute(share, ffn_input)
                    if outcomes is not None:
                        contribution = self._travelled(contribution)
                    by = self._lateness(outcomes, layer, worker)
                    _fold(x, contribution, by, _mean(means, share), layer + 1, owed)
            late = owed.pop(layer + 1, None)
            if late is not None:
                x += late
        return x

    def logits(self, hidden: Floats) -> Floats:
        """Logits (n_wanted, n_vocab) of the rows that the batch of the last `run` wants."""
        return self.steps.logits(hidden)

    def _check(self, outcomes: Outcomes | None, n_rows: int) -> None:
        needed = (n_rows, self.shape.n_layers, self.n_parts)
        if outcomes is not None and (outcomes.shape[1:] != needed[1:] or len(outcomes) not in (1, n_rows)):
            raise RequestError(f"outcomes {outcomes.shape}; needed is {needed}, or one row for all")

    def _lateness(self, outcomes: Outcomes | None, layer: int, worker: int) -> Outcomes | None:
        """(n_rows or 1, n_embd) of a worker's contribution; None where all of it is on time."""
        if outcomes is None:
            return None
        first = worker * self.n_fragments
        by = outcomes[:, layer, first : first + self.n_fragments]
        if not by.any():
            return None
        spread: Outcomes = by[:, self._fragment]
        return spread

    def _travelled(self, contribution: Floats) -> Floats:
        if self._form is ActivationForm.F32:
            return contribution
        return decode(self._form, encode(self._form, contribution), *contribution.shape)

    def close(self) -> None:
        """Free the shares and graphs; the model stays. Safe to call twice."""
        for share in self._shares.values():
            share.close()
        self._shares.clear()
        self._workers = []
        self.computer.close()
        self.steps.close()


def _of_layer(layer: int, workers: Sequence[Sequence[Sequence[int]]], shape: PartitionShape) -> list[Groups]:
    """This device's groups of a layer, then each worker's.

    Raises:
        RequestError: there are no such groups, or two workers have the same one.
    """
    if any(len(layers) != shape.n_layers for layers in workers):
        raise RequestError(f"groups of each of {shape.n_layers} layers are needed for every worker")
    groups = [tuple(sorted(layers[layer])) for layers in workers]
    taken = {group for of_worker in groups for group in of_worker}
    if len(taken) != sum(map(len, groups)):
        raise RequestError(f"layer {layer}: a neuron group was given away twice")
    if not taken <= set(range(shape.n_groups)):
        raise RequestError(f"layer {layer} has the neuron groups 0 to {shape.n_groups - 1}")
    return [tuple(group for group in range(shape.n_groups) if group not in taken), *groups]


def _mean(means: NDArray[np.floating] | None, share: Share) -> Floats | float:
    if means is None:
        return 0.0
    mean: Floats = means[share.layer, list(share.ids)].sum(axis=0, dtype=np.float32)
    return mean


def _fold(
    x: Floats,
    contribution: Floats,
    by: Outcomes | None,
    mean: Floats | float,
    boundary: int,
    owed: dict[int, Floats],
) -> None:
    """Add what is on time to the stream, the mean for the rest, and note what is owed to which boundary."""
    if by is None:
        x += contribution
        return
    by = np.broadcast_to(by, contribution.shape)
    missing = contribution - mean
    x += np.where(by == ON_TIME, contribution, mean)
    for late in np.unique(by[by > ON_TIME]).tolist():
        came = np.where(by == late, missing, np.float32(0))
        if boundary + late in owed:
            owed[boundary + late] += came
        else:
            owed[boundary + late] = came
