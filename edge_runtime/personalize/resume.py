"""What an interrupted edit needs to go on: the state of its searches, as bytes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np

from edge_runtime.personalize.objective import Objective
from edge_runtime.personalize.search import State


@dataclass(frozen=True, slots=True, eq=False)
class SavedSearch:
    """A search between two steps, without what its contexts give."""

    delta: np.ndarray[Any, np.dtype[np.float64]]
    momentum: np.ndarray[Any, np.dtype[np.float64]]
    step: int
    length: float
    losses: tuple[float, ...]
    longer: int


@dataclass(frozen=True, slots=True)
class Spent:
    """Time, in seconds, and rows computed."""

    seconds: float = 0.0
    rows: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.rows + other.rows)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.seconds - other.seconds, self.rows - other.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Of one edit.

    Attributes:
        searches: number of the subject -> its search.
        spent: until then, on all.
        searching: of that, on the searches.
    """

    searches: Mapping[int, SavedSearch] = field(default_factory=dict)
    spent: Spent = Spent()
    searching: Spent = Spent()

    def with_state(self, number: int, state: State) -> Kept:
        """With a search's state in place of what there was of it."""
        saved = SavedSearch(
            state.point.delta, state.momentum, state.step, state.length, state.losses, state.longer
        )
        return replace(self, searches={**self.searches, number: saved})

    def state_of(self, number: int, objective: Objective) -> State | None:
        """Where a search goes on; None where it begins, or where the model has become another.

        Args:
            objective: new; it allows changes as long as it did then.
        """
        saved = self.searches.get(number)
        if saved is None:
            return None
        width = objective.start.delta.shape
        for vector in (saved.delta, saved.momentum):
            if vector.shape != width or vector.dtype != np.float64 or not np.isfinite(vector).all():
                return None
        for _ in range(saved.longer):
            if not objective.allow_longer():
                break
        point = objective.points(saved.delta[None])[0]
        return State(point, saved.step, saved.momentum, saved.length, saved.losses, saved.longer)


def to_bytes(kept: Kept) -> bytes:
    """As the store keeps it."""
    searches = kept.searches.items()
    meta = {
        "spent": astuple(kept.spent),
        "searching": astuple(kept.searching),
        "searches": {str(number): [s.step, s.length, list(s.losses), s.longer] for number, s in searches},
    }
    arrays: dict[str, Any] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    for number, saved in searches:
        arrays[f"delta.{number}"], arrays[f"momentum.{number}"] = saved.delta, saved.momentum
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def from_bytes(content: bytes) -> Kept:
    """The reverse of `to_bytes`; what cannot be read is as if nothing had been kept."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            meta = json.loads(bytes(arrays["meta"]))
            searches = {
                int(number): SavedSearch(
                    arrays[f"delta.{number}"],
                    arrays[f"momentum.{number}"],
                    int(step),
                    float(length),
                    tuple(float(loss) for loss in losses),
                    int(longer),
                )
                for number, (step, length, losses, longer) in meta["searches"].items()
            }
            spent, searching = (Spent(*map(float, meta[name])) for name in ("spent", "searching"))
            return Kept(searches, spent, searching)
    # RuntimeError: encrypted, of an unknown compression, or JSON that nests too deeply.
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError):
        return Kept()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # parts that do not fit together
        return Kept()
