"""Solves all standing edits of a model together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.engine.adapters import LowRank
from edge_runtime.personalize.records import Record, Solution
from edge_runtime.personalize.solve import KeyCovariance, readouts


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One subject's share of an edit.

    Attributes:
        subject: what is changed of one subject by several edits adds up.
        keys: (n_keys, n_ff) float32.
        delta: (n_embd,) float32.
    """

    subject: str
    keys: np.ndarray[Any, np.dtype[np.float32]]
    delta: np.ndarray[Any, np.dtype[np.float32]]


def subjects_of(request: Mapping[str, Any]) -> list[str]:
    """The subjects of a stored request, each once, in their order."""
    queries = request.get("queries") or [request]
    return list(dict.fromkeys(str(query["subject"]) for query in queries))


def parts_of(record: Record, solution: Solution) -> list[Part]:
    """A stored edit's parts."""
    return [
        Part(subject, solution.keys[solution.parts == number], solution.deltas[number])
        for number, subject in enumerate(subjects_of(record.request))
    ]


def solution_of(layer: int, parts: Sequence[Part]) -> Solution:
    """Parts as the store keeps them."""
    numbers = [np.full(len(part.keys), number, np.int32) for number, part in enumerate(parts)]
    return Solution(
        layer,
        np.concatenate([part.keys for part in parts]),
        np.concatenate(numbers),
        np.stack([part.delta for part in parts]),
    )


def solve_together(
    covariance: KeyCovariance, layer: int, edits: Mapping[int, Sequence[Part]]
) -> dict[int, tuple[LowRank, ...]]:
    """The low-rank changes of some edits in one layer, so that none changes what another does.

    Args:
        edits: id -> its parts.

    Returns:
        id -> its change of the layer's ffn_down, of as many ranks as it has parts.
    """
    flat = [(number, part) for number, parts in edits.items() for part in parts]
    if not flat:
        return {}
    keys = np.concatenate([part.keys for _, part in flat])
    of_key = [part.subject for _, part in flat for _ in part.keys]
    strengths = np.array([[float(subject == part.subject) for _, part in flat] for subject in of_key])
    read = readouts(covariance, keys, strengths)
    found: dict[int, tuple[LowRank, ...]] = {}
    for number in edits:
        rows = [index for index, (owner, _) in enumerate(flat) if owner == number]
        b = np.stack([flat[index][1].delta for index in rows], axis=1)
        found[number] = (LowRank(f"blk.{layer}.ffn_down.weight", read[rows], np.ascontiguousarray(b)),)
    return found
