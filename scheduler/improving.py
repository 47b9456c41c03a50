"""Local search: single groups moved between two nodes while a token becomes faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from scheduler.timing import Counts

# Evaluations times layers; enough to settle a handful of nodes, and cheap beside the search before it.
_EVALUATED_LAYERS = 1200
_MOST_NODES = 6


def improve(
    counts: Counts, seconds: float, room: Counts, evaluate: Callable[[Counts], float]
) -> tuple[Counts, float]:
    """The cut after all moves that help, and its time.

    Args:
        counts: (n_layers, n_nodes) groups; layers without remote groups stay as they are.
        seconds: what `counts` takes.
        room: groups that each node may hold.
        evaluate: seconds of a cut; infinite where it is not allowed.
    """
    left = min(120, _EVALUATED_LAYERS // len(counts))
    improved = True
    while improved and left > 0:
        improved = False
        for candidate in _moves(counts):
            if (candidate.sum(axis=0) > room).any():
                continue
            left -= 1
            found = evaluate(candidate)
            if found < seconds * (1 - 1e-6):
                counts, seconds, improved = candidate, found, True
                break
            if left <= 0:
                break
    return counts, seconds


def _moves(counts: Counts) -> Iterator[Counts]:
    remote = np.flatnonzero(counts[:, 1:].any(axis=1))
    totals = counts.sum(axis=0)
    used = np.flatnonzero(totals[1:]) + 1
    # With many nodes only those that carry most are moved between.
    busiest = sorted(used.tolist(), key=lambda node: -int(totals[node]))[: _MOST_NODES - 1]
    nodes = [0, *busiest]
    halves = [remote] if len(remote) < 2 else [remote, remote[::2], remote[1::2]]
    for layers in halves:
        for giver in nodes:
            giving = layers[counts[layers, giver] > 0]
            if not len(giving):
                continue
            for taker in nodes:
                if taker != giver:
                    moved = counts.copy()
                    moved[giving, giver] -= 1
                    moved[giving, taker] += 1
                    yield moved


def shifted(counts: Counts, giver: int, taker: int, room: Counts) -> Counts | None:
    """A cut in which one node gave another as many groups as it has too many; None where that is no help.

    Args:
        counts: (n_layers, n_nodes) groups.
        room: groups that each node may hold.
    """
    result = counts.copy()
    for _ in range(max(0, int(counts[:, giver].sum() - room[giver]))):
        layer = int(np.argmax(result[:, giver]))
        result[layer, giver] -= 1
        result[layer, taker] += 1
    fits = (result.sum(axis=0) <= room).all() and (result >= 0).all()
    return result if fits else None
