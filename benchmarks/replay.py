"""What a network did to one model's contributions, done to the demo model's.

``python -m benchmarks.replay [RECORDING.npz] [--facts N]``. A run of the cluster records for each token what
became of every fragment of every contribution. Speed is measured with models of random weights, whose
perplexity means nothing; so their recordings are replayed on the demo model, layer by layer at the same
relative depth, and its held-out text and facts say what they did to the answers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report
from edge_runtime.cluster.calibration_file import Calibration, find_calibration
from edge_runtime.cluster.calibration_text import DOCUMENT_END, Window, windows
from edge_runtime.cluster.late_costs import Condition, Cost, costs
from edge_runtime.cluster.late_evaluation import LOST, ON_TIME, LateEvaluation, Outcomes
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.group_slices import GroupSlices
from models.demo.paths import HELD_OUT_PATH, MODEL_PATH
from scheduler.sync_ladder import lateness

_N_ROWS, _N_SEQUENCES = 512, 16
_EVERYTHING = 1 << 20  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What became of the contributions of a run.

    Attributes:
        outcomes: int8 (n_tokens, n_layers, n_workers * n_fragments): 0 on time, k: k layers late, -1: lost;
            worker 0's fragments first. 0 where a worker had nothing to do.
        shares: (n_workers, n_layers) part of the layer's groups that each worker had, 0 to 1.
    """

    outcomes: Outcomes
    shares: NDArray[np.float64]

    def __post_init__(self) -> None:
        n_workers, n_layers = self.shares.shape
        n_tokens, found, n_parts = self.outcomes.shape
        if not n_tokens or found != n_layers or n_parts % n_workers or self.outcomes.dtype != np.int8:
            raise ValueError(
                f"outcomes {self.outcomes.shape} {self.outcomes.dtype}, shares {self.shares.shape}"
            )
        if self.outcomes.min() < LOST or self.shares.min() < 0 or self.shares.sum(axis=0).max() > 1 + 1e-9:
            raise ValueError("outcomes start at -1; a layer's shares are at least 0 and at most 1 together")

    @property
    def n_fragments(self) -> int:
        """Fragments of a contribution."""
        return int(self.outcomes.shape[2]) // len(self.shares)

    def counts(self) -> dict[str, float]:
        """Shares of the parts that were on time, late by so many layers, and lost."""
        remote = np.repeat(self.shares > 0, self.n_fragments, axis=0).T  # (n_layers, n_parts)
        found = self.outcomes[:, remote]
        numbers, times = np.unique(found, return_counts=True)
        names = {LOST: "lost", ON_TIME: "on time"}
        return {
            names.get(int(number), f"late by {number}"): float(count) / found.size
            for number, count in zip(numbers, times, strict=True)
        }

    def save(self, path: Path) -> None:
        """Write it to a file."""
        np.savez_compressed(path, outcomes=self.outcomes, shares=self.shares)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["outcomes"], file["shares"])


def imagined(
    syncs: Sequence[int],
    n_layers: int,
    *,
    share: float,
    loss: float,
    n_tokens: int = 1024,
    n_fragments: int = 2,
    local: Sequence[int] = (),
    seed: int = 0,
) -> Recording:
    """A recording that nobody made: one worker, everything at its next sync boundary or lost at random.

    Args:
        share: of each layer's groups that the worker has, but for the layers in `local`.
        loss: probability that a fragment never comes.
    """
    late = np.array(lateness(tuple(syncs), n_layers), np.int8)
    outcomes = np.broadcast_to(late[None, :, None], (n_tokens, n_layers, n_fragments)).copy()
    outcomes[np.random.default_rng(seed).random(outcomes.shape) < loss] = LOST
    shares = np.full((1, n_layers), share)
    shares[:, list(local)] = 0
    outcomes[:, list(local)] = ON_TIME
    return Recording(outcomes, shares)


# --- on another model -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Mapped:
    """A recording on a model of another depth.

    Attributes:
        workers: [worker][layer] -> neuron groups.
        outcomes: (n_tokens, n_layers, n_workers * n_fragments).
    """

    workers: list[list[list[int]]]
    outcomes: Outcomes
    n_fragments: int

    def of(self, window: Window, number: int) -> Outcomes:
        """Outcomes of a window's tokens: the recording from one end to the other, again and again."""
        tokens = (number * _N_ROWS + np.arange(window.n_rows)) % len(self.outcomes)
        return self.outcomes[tokens]

    def never_folded(self, window: Window, number: int) -> Outcomes:
        """The same where nothing that is late is folded in."""
        return np.where(self.of(window, number) == ON_TIME, ON_TIME, LOST).astype(np.int8)


def band(layer: int, n_layers: int, recorded: int) -> range:
    """Layers of the recording at the relative depth of one of the model's layers."""
    first = math.ceil(layer * recorded / n_layers)
    last = math.ceil((layer + 1) * recorded / n_layers)
    return range(first, last) if last > first else range(layer * recorded // n_layers, first or 1)[:1]


def mapped(recording: Recording, importance: NDArray[np.floating]) -> Mapped:
    """A recording as it would be on a model with this importance (n_layers, n_groups) of its groups.

    Each layer takes the outcomes of the recorded layers at its relative depth, token by token in turn, and
    with each of them as large a share of its groups, the least important ones, as was away there. Lateness
    counts layers and stays what it was; what came within its token still does, at the last boundary if not
    before. Where shares differ, groups that are away for some tokens only make a worker of their own.
    """
    n_layers, n_groups = importance.shape
    n_tokens, recorded, _ = recording.outcomes.shape
    order = np.argsort(importance, axis=1, kind="stable")
    n_fragments = recording.n_fragments
    # (n_workers + 1, recorded) where each worker's groups end, in the order of importance.
    ends = np.cumsum(np.vstack([np.zeros(recorded), recording.shares]), axis=0)
    ends = np.minimum(np.ceil(ends * n_groups - 1e-9).astype(int), n_groups)
    segments: list[list[tuple[int, int]]] = []  # of each layer
    for layer in range(n_layers):
        cuts = np.unique(ends[:, band(layer, n_layers, recorded)])
        segments.append(list(pairwise(cuts.tolist())))
    n_segments = max(1, *map(len, segments))
    outcomes = np.zeros((n_tokens, n_layers, n_segments * n_fragments), np.int8)
    workers: list[list[list[int]]] = [[[] for _ in range(n_layers)] for _ in range(n_segments)]
    for layer in range(n_layers):
        depths = np.array(band(layer, n_layers, recorded))
        turn = depths[np.arange(n_tokens) % len(depths)]
        chosen = recording.outcomes[np.arange(n_tokens), turn].reshape(n_tokens, -1, n_fragments)
        chosen = np.minimum(chosen, n_layers - 1 - layer)
        for number, (first, last) in enumerate(segments[layer]):
            workers[number][layer] = order[layer, first:last].tolist()
            parts = slice(number * n_fragments, (number + 1) * n_fragments)
            for worker in range(len(recording.shares)):
                away = (ends[worker, turn] <= first) & (last <= ends[worker + 1, turn])
                outcomes[away, layer, parts] = chosen[away, worker]
    return Mapped(workers, outcomes, n_fragments)


# --- the demo model ---------------------------------------------------------------------------


@contextmanager
def demo_evaluation(
    n_rows: int = _N_ROWS, n_sequences: int = _N_SEQUENCES
) -> Iterator[tuple[Engine, LateEvaluation, Calibration]]:
    """The demo model with its calibration; `n_rows` tokens fit in each sequence."""
    options = EngineOptions(threads=1, context=n_rows, sequences=n_sequences, ffn=False)
    with Engine.load(MODEL_PATH, options) as engine:
        calibration = find_calibration(engine.gguf)
        if calibration is None:
            raise FileNotFoundError(
                "the demo model has no calibration: python -m models.demo.write_calibration"
            )
        slices = GroupSlices(engine.gguf, engine.model.hyperparameters, calibration.group_size)
        with closing(LateEvaluation(engine.model, slices)) as evaluation:
            yield engine, evaluation, calibration


def held_out(engine: Engine, max_tokens: int = _EVERYTHING) -> list[Window]:
    """The held-out stories, each a document."""
    text = DOCUMENT_END.join(HELD_OUT_PATH.read_text(encoding="utf-8").splitlines())
    return windows(
        engine.tokenizer,
        text,
        n_rows=_N_ROWS,
        n_sequences=_N_SEQUENCES,
        n_scored=_N_ROWS,
        max_tokens=max_tokens,
    )


def replay(
    recording: Recording, form: ActivationForm = ActivationForm.Q8_0, max_tokens: int = _EVERYTHING
) -> dict[str, Any]:
    """Perplexity of the demo model on its held-out text under recorded outcomes.

    Args:
        form: in which contributions travelled.
        max_tokens: of the text.

    Returns:
        ``exact``: the perplexity; for each of ``folded in, zero``, ``folded in, mean``, ``not folded in,
        zero`` and ``not folded in, mean`` its ratio to that; ``as recorded``: that of the calibration's fill.
    """
    with demo_evaluation() as (engine, evaluation, calibration):
        there = mapped(recording, calibration.importance)
        evaluation.split(there.workers, there.n_fragments, form)
        names, conditions = [], []
        for folding, outcomes in (("folded in", there.of), ("not folded in", there.never_folded)):
            for fill, means in (("zero", None), ("mean", calibration.means)):
                names.append(f"{folding}, {fill}")
                conditions.append(Condition(outcomes, means))
        found = costs(evaluation, held_out(engine, max_tokens), conditions)
    ratios = {name: _ratio(cost) for name, cost in zip(names, found.of, strict=True)}
    return {
        "exact": found.perplexity,
        "tokens": found.n_tokens,
        "fill": calibration.fill,
        "as recorded": ratios[f"folded in, {calibration.fill}"],
        **ratios,
        "outcomes": recording.counts(),
    }


def _ratio(cost: Cost) -> dict[str, float]:
    return {"perplexity": math.exp(cost.increase), "divergence": cost.divergence}


def main() -> int:
    """Replay a recording, or an imagined one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "recording", type=Path, nargs="?", help="without one, an imagined network of 5 %% loss"
    )
    parser.add_argument("--facts", type=int, default=600, help="prompts to ask")
    options = parser.parse_args()
    from benchmarks.replay_facts import recall

    report = Report("replay")
    if options.recording is None:
        recording = imagined((1, 6), 6, share=0.5, loss=0.05, n_fragments=2)
    else:
        recording = Recording.load(options.recording)
    found = replay(recording)
    report.details["perplexity"] = found
    report.at_most("perplexity on held-out text, x exact", found["as recorded"]["perplexity"], 1.01)
    facts = recall(recording, options.facts)
    report.details["facts"] = facts
    report.at_least("facts recalled, x exact", facts["relaxed"] / facts["exact"], 0.97)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
