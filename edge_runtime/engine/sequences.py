"""Places in the KV cache for requests, and which of their tokens' keys and values are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engine.kv_cache import KVCells

_WORTH_SHARING = 32  # tokens of another place's prefix that make sharing its cells worth while


@dataclass(slots=True, eq=False)
class Place:
    """A sequence of the KV cache.

    Attributes:
        number: of the sequence.
        tokens: whose keys and values it holds.
        busy: a request is using it.
        under: the adapters, by version and strength, that they were computed with.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    under: tuple[tuple[str, float], ...] = ()


class Places:
    """All sequences of one model. What a request leaves serves the next one that begins alike."""

    def __init__(self, cells: KVCells) -> None:
        self._cells = cells
        self._places = [Place(number) for number in range(cells.n_sequences)]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def n_free(self) -> int:
        """Places that no request uses."""
        return sum(not place.busy for place in self._places)

    def claim(self, tokens: Sequence[int], under: tuple[tuple[str, float], ...] = ()) -> Place | None:
        """A place that already holds as many leading tokens of a prompt as any does; None if all are busy.

        `place.tokens` are those that need not be computed again: never all, because the last token's logits
        are what generation starts from. Where a busy place holds a longer prefix, its cells are shared.
        What was computed with other adapters than `under` is of no use.
        """
        free = [place for place in self._places if not place.busy]
        if not free:
            return None
        usable = tokens[:-1]
        shared = {
            place.number: _common_prefix(usable, place.tokens) if place.under == under else 0
            for place in self._places
        }
        chosen = max(free, key=lambda place: (shared[place.number], -len(place.tokens)))
        best = max(self._places, key=lambda place: shared[place.number])
        reused = shared[chosen.number]
        if shared[best.number] >= reused + _WORTH_SHARING:
            reused = shared[best.number]
            self._cells.copy(best.number, chosen.number, reused)
        else:
            self._cells.remove(chosen.number, reused)
        chosen.tokens = list(tokens[:reused])
        chosen.under = under
        chosen.busy = True
        return chosen

    def release(self, place: Place) -> None:
        """Leave a place to others; its cells stay for requests that begin alike. Safe to call twice."""
        place.busy = False

    def forget(self, of: Callable[[Place], bool] = lambda place: True) -> None:
        """Empty those places that no request uses; all, or those for which `of` is true."""
        for place in self._places:
            if not place.busy and of(place):
                self._cells.remove(place.number)
                place.tokens.clear()


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differs[0]) if differs.size else length
