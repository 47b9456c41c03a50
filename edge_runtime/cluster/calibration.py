"""Measures on a text which neuron groups matter, and what it costs when they come late or never.

A cost is the mean Kullback-Leibler divergence of the model's next-token distribution from the exact one. On
text like the model's own it is the expected increase of the logarithm of the perplexity (ln-ppl), but it is
never negative, scatters far less, and means something on any text. Where sync sets are judged as a whole,
the measured increase counts if it is larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.calibration_file import Calibration, Fill
from edge_runtime.cluster.calibration_text import Window, windows
from edge_runtime.cluster.late_costs import Condition, Cost, Costs, Progress, costs
from edge_runtime.cluster.late_evaluation import LOST, MAX_LATE, LateEvaluation, Outcomes
from edge_runtime.cluster.thread_choice import fastest_threads
from edge_runtime.engine.architecture import Hyperparameters, check_tensors, read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.model import Model
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import RequestError
from scheduler.meter import MEASURED_SHARE
from scheduler.patience import Response, Rung
from scheduler.sync_ladder import ladder, lateness

Floats = NDArray[np.float32]

SHARES = (0.25, 0.5, 0.75, 1.0)  # remote shares that sync sets are measured with
DEFAULT_TOKENS = 2048
MAX_TOKENS = 1 << 20

_MAX_ROWS = 512
_N_SEQUENCES = 16
_MAX_STREAM_VALUES = 1 << 25  # of the residual streams of a window, before all layers: 128 MiB
_MAX_LOGITS = 1 << 23  # of a window: 32 MiB, and some times as much while they are compared
_LOSS = 0.05  # of contributions, where the fills are compared
_MEAN_GAIN = 0.1  # less of the cost makes the mean worth its memory; on the demo model it is 4 %, noise
_RUNG_STEPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # sync counts that are measured
_NORM_READINGS = 3.0  # computing each group by itself, and making these shares, takes as long as so many
_LATE_STEPS = (1, 2, 3, 4, 8, 16, 32, 64)  # lateness that is measured; between them it is interpolated


def calibrate(
    path: Path,
    text: str,
    *,
    group_size: int | None = None,
    threads: int | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress = lambda share: None,
) -> Calibration:
    """Measure a model. The same file, text and CPU give the same result.

    Args:
        path: a GGUF file.
        text: like what the model is used for; form feeds end documents.
        group_size: neurons in a group; None chooses as everywhere.
        threads: None takes one, or the physical cores, whichever is faster now.
        max_tokens: of the text that are used. Time grows in proportion, and a little faster than with the
            square of the number of layers.
        progress: called with the share done, 0 to 1.

    Raises:
        RequestError: too short a text, or a group size that the file does not allow or that leaves too few.
        ModelFileError: the file is damaged or has an FFN that cannot be cut.
        OutOfMemoryError: it does not fit.
    """
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise RequestError(f"{max_tokens} tokens were asked for; possible are 1 to {MAX_TOKENS}")
    with ExitStack() as resources:
        gguf = resources.enter_context(GGUFFile(path))
        hp = read_hyperparameters(gguf)
        check_tensors(gguf, hp)
        slices = GroupSlices(gguf, hp, group_size)
        if slices.shape.n_groups < len(SHARES):
            raise RequestError(
                f"groups of {slices.shape.group_size} neurons leave {slices.shape.n_groups} in a layer; at "
                f"least {len(SHARES)} are needed: choose a smaller group size"
            )
        tokenizer = resources.enter_context(closing(Tokenizer(gguf)))
        n_rows = window_rows(hp)
        model = resources.enter_context(
            closing(
                Model(
                    gguf,
                    hp,
                    n_cells=n_rows,
                    n_sequences=_N_SEQUENCES,
                    threads=threads or fastest_threads(slices, min(n_rows, max_tokens)),
                    ffn=False,
                )
            )
        )
        cut = windows(
            tokenizer,
            text,
            n_rows=n_rows,
            n_sequences=_N_SEQUENCES,
            n_scored=max(1, _MAX_LOGITS // hp.n_vocab),
            max_tokens=max_tokens,
        )
        evaluation = resources.enter_context(closing(LateEvaluation(model, slices)))
        return _Calibrator(evaluation, slices, cut, progress).run()


def window_rows(hyperparameters: Hyperparameters) -> int:
    """Tokens of a window: as many as memory for their streams allows, and no more than the context."""
    fitting = _MAX_STREAM_VALUES // ((hyperparameters.n_layers + 1) * hyperparameters.n_embd)
    return min(_MAX_ROWS, hyperparameters.n_ctx_train, max(fitting, 64))


class _Calibrator:
    def __init__(
        self, evaluation: LateEvaluation, slices: GroupSlices, cut: Sequence[Window], progress: Progress
    ) -> None:
        self._evaluation = evaluation
        self._slices = slices
        self._windows = cut
        self._progress = progress
        self._n_layers = slices.shape.n_layers

    def run(self) -> Calibration:
        n_layers, shape = self._n_layers, self._slices.shape
        norms, fills, singles, ladders = _phases(n_layers)
        importance, self._means = self._norms_and_means(self._phase(*norms))
        order = np.argsort(importance, axis=1, kind="stable")
        self._evaluation.split(_quarters(order))
        fill = self._better_fill(self._phase(*fills))
        late_cost, lost_cost = self._single_layers(fill, self._phase(*singles))
        rungs, measured, exact = self._rungs(fill, late_cost, self._phase(*ladders))
        return Calibration(
            group_size=shape.group_size,
            importance=importance,
            means=self._means.astype(np.float16),
            fill=fill,
            response=Response(n_layers, late_cost, lost_cost, rungs),
            n_tokens=exact.n_tokens,
            perplexity=exact.perplexity,
            divergences=measured[:, :, 0],
            increases=measured[:, :, 1],
        )

    def _phase(self, first: float, last: float) -> Progress:
        return lambda share: self._progress(first + (last - first) * share)

    # --- groups -------------------------------------------------------------------------------

    def _norms_and_means(self, progress: Progress) -> tuple[Floats, Floats]:
        """Of each group's contribution: the mean norm (n_layers, n_groups), and the mean itself."""
        evaluation, shape = self._evaluation, self._slices.shape
        norms = np.zeros((shape.n_layers, shape.n_groups))
        sums = np.zeros((shape.n_layers, shape.n_groups, shape.n_embd))
        streams: list[Floats | None] = [None] * len(self._windows)
        for layer in range(shape.n_layers):
            shares = [
                evaluation.computer.share(layer, {group: self._slices.group(layer, group)})
                for group in range(shape.n_groups)
            ]
            try:
                for number, window in enumerate(self._windows):
                    evaluation.clear()
                    begun = evaluation.steps.begin(window.batch)
                    before = streams[number]
                    residual, ffn_input = evaluation.steps.attention(
                        layer, begun if before is None else before
                    )
                    stream = residual.copy()
                    for group, share in enumerate(shares):
                        contribution = evaluation.computer.compute(share, ffn_input)
                        norms[layer, group] += np.linalg.norm(contribution, axis=1).sum(dtype=np.float64)
                        sums[layer, group] += contribution.sum(axis=0, dtype=np.float64)
                        stream += contribution
                    streams[number] = stream
            finally:
                for share in shares:
                    share.close()
            progress((layer + 1) / shape.n_layers)
        n_tokens = sum(window.n_rows for window in self._windows)
        return (norms / n_tokens).astype(np.float32), (sums / n_tokens).astype(np.float32)

    # --- costs --------------------------------------------------------------------------------

    def _better_fill(self, progress: Progress) -> Fill:
        """What harms less if the least important half is late by one layer, and where some of it is lost."""
        late = np.zeros((1, self._n_layers, len(SHARES)), np.int8)
        late[:, :-1, : _n_parts(MEASURED_SHARE)] = 1
        conditions = [
            condition
            for means in (None, self._means)
            for condition in (Condition(late, means), Condition(self._random_loss, means))
        ]
        found = [cost.divergence for cost in self._costs(conditions, progress).of]
        zero, mean = sum(found[:2]), sum(found[2:])
        return "mean" if mean < (1 - _MEAN_GAIN) * zero else "zero"

    def _costs(self, conditions: Sequence[Condition], progress: Progress) -> Costs:
        return costs(self._evaluation, self._windows, conditions, progress)

    def _fill(self, fill: Fill) -> Floats | None:
        return self._means if fill == "mean" else None

    def _random_loss(self, window: Window, number: int) -> Outcomes:
        lost = np.random.default_rng(number).random((window.n_rows, self._n_layers)) < _LOSS
        outcomes = np.zeros((window.n_rows, self._n_layers, len(SHARES)), np.int8)
        outcomes[:, :, : _n_parts(MEASURED_SHARE)] = np.where(lost, LOST, 0)[:, :, None]
        return outcomes

    def _single_layers(
        self, fill: Fill, progress: Progress
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """late_cost (n_layers, K) and lost_cost (n_layers,) of `scheduler.patience.Response`."""
        n_layers = self._n_layers
        places = [
            (layer, late)
            for layer in range(n_layers)
            for late in (LOST, *_measured_lateness(layer, n_layers))
        ]
        conditions = []
        for layer, late in places:
            outcomes = np.zeros((1, n_layers, len(SHARES)), np.int8)
            outcomes[:, layer, : _n_parts(MEASURED_SHARE)] = late
            conditions.append(Condition(outcomes, self._fill(fill), layer))
        found = dict(zip(places, self._costs(conditions, progress).of, strict=True))
        late_cost = np.full((n_layers, max(1, min(n_layers - 1, MAX_LATE))), np.inf)
        for layer in range(n_layers):
            measured = _measured_lateness(layer, n_layers)
            if measured:
                steps = np.arange(1, measured[-1] + 1)
                values = [found[layer, late].divergence for late in measured]
                late_cost[layer, : len(steps)] = np.interp(steps, measured, values)
        return late_cost, np.array([found[layer, LOST].divergence for layer in range(n_layers)])

    def _rungs(
        self, fill: Fill, late_cost: NDArray[np.float64], progress: Progress
    ) -> tuple[tuple[Rung, ...], NDArray[np.float64], Costs]:
        """Sync sets measured as wholes.

        Returns:
            the sets; (n_rungs, n_shares, 2) their divergences and ln-ppl increases; what the exact model did.
        """
        steps = {*_RUNG_STEPS, self._n_layers}
        sets = [syncs for syncs in ladder(late_cost, self._n_layers) if len(syncs) in steps]
        conditions = []
        for syncs in sets[1:]:  # with the first one everything is on time
            late = np.array(lateness(syncs, self._n_layers), np.int8)
            for n_parts in range(1, len(SHARES) + 1):
                outcomes = np.zeros((1, self._n_layers, len(SHARES)), np.int8)
                outcomes[:, :, :n_parts] = late[:, None]
                start = int(np.flatnonzero(late)[0])
                conditions.append(Condition(outcomes, self._fill(fill), start))
        costs_found = self._costs(conditions, progress)
        found = [Cost(0.0, 0.0)] * len(SHARES) + list(costs_found.of)
        measured = np.array([(cost.divergence, cost.increase) for cost in found])
        measured = measured.reshape(len(sets), len(SHARES), 2)
        worst = np.maximum(measured.max(axis=2), 0.0).tolist()
        rungs = tuple(Rung(syncs, SHARES, tuple(row)) for syncs, row in zip(sets, worst, strict=True))
        return rungs, measured, costs_found


def _phases(n_layers: int) -> list[tuple[float, float]]:
    """Parts of the whole time, from 0 to 1, of the four phases, by how often each reads the text."""
    singles = 1 + sum(
        (1 + len(_measured_lateness(layer, n_layers))) * (n_layers - layer) / n_layers
        for layer in range(n_layers)
    )
    n_rungs = len({step for step in _RUNG_STEPS if step < n_layers})
    readings = [_NORM_READINGS, 5.0, singles, 1.0 + len(SHARES) * n_rungs]
    ends = [0.0, *np.cumsum(readings) / sum(readings)]
    return list(pairwise(map(float, ends)))


def _n_parts(share: float) -> int:
    """Quarters that make up a share."""
    return SHARES.index(share) + 1


def _quarters(order: NDArray[np.intp]) -> list[list[list[int]]]:
    """[quarter][layer] -> groups, the least important first; a share that does not divide is rounded up."""
    n_groups = order.shape[1]
    ends = [0, *(math.ceil(share * n_groups) for share in SHARES)]
    return [[row[first:last].tolist() for row in order] for first, last in pairwise(ends)]


def _measured_lateness(layer: int, n_layers: int) -> list[int]:
    """By how many layers a layer is measured late: small numbers, and the largest that is possible."""
    most = min(n_layers - 1 - layer, MAX_LATE)
    return sorted({late for late in _LATE_STEPS if late < most} | ({most} if most else set()))
