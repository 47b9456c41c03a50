"""The search for the fastest cut: which workers, which layers, which syncs, how many groups."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.blending import blend
from scheduler.datagrams import missing_share
from scheduler.filling import Filling, fill
from scheduler.heads import head_choices, spread_head
from scheduler.improving import improve, shifted
from scheduler.layouts import Layout, even_layout
from scheduler.patience import Response, allowance
from scheduler.patient_layouts import PatientLayouts
from scheduler.placement import group_room
from scheduler.rounding import whole_rows
from scheduler.timing import Counts, Mode, TimeModel

# Up to so many workers every subset is tried; beyond, the best first ones in a few orders.
_ALL_SUBSETS = 5
# What is looked at in more detail.
_BEST_SUBSETS = 3
_SMALL_SIZES = (1, 2, 3)
_LOOKED_AT_HEADS = 16
_BEST_HEADS = 4
_BLENDED_HEADS = 3
_BEST_FILLINGS = 8
_BEST_LAYOUTS = 8
_ENOUGH_DRAFTS = 12
_MOST_ROUNDED = 24
# With many workers a draft takes longer to judge, and the first ones lie closer together.
_ENOUGH_LARGE_DRAFTS = 5
_MOST_LARGE_ROUNDED = 10
_TRIED_HEADS = 2
_SWAPPING_WORKERS = 3
_SWAPPED_ROWS = 2
_BEST_DRAFTS = 3
_SHARE_CAPS = (0.25, 0.5, 0.75, 1.0)


# Seconds, about; which one it is; groups of a remote layer; which layers; slices of the head.
_Option = tuple[float, int, Filling, Layout, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Draft:
    """A cut in whole groups.

    Attributes:
        counts: (n_layers, 1 + n_workers) groups on each node.
        head: slices of the head on each node.
        syncs: rising boundaries at which everything is waited for.
        seconds: mean of a token.
    """

    counts: Counts
    head: tuple[int, ...]
    syncs: tuple[int, ...]
    seconds: float


class Search:
    """Looks for drafts that use at least one worker.

    Args:
        time: the model of time.
        response: of a model of the same depth; None for `exact`, and where nothing is known.
        quality: bound for `relaxed`.
    """

    def __init__(self, time: TimeModel, mode: Mode, response: Response | None, quality: float) -> None:
        self._time = time
        self._mode = mode
        self._response = response if mode == "relaxed" else None
        self._quality = quality
        self._patient = PatientLayouts(time, self._response, quality) if self._response else None
        self._sets: list[tuple[int, ...]] = []
        self._every = tuple(range(1, time.model.n_layers + 1))

    def best(self) -> Draft | None:
        """The fastest draft found; None where memory allows none."""
        options: list[_Option] = []
        drafts: list[Draft] = []
        for nodes in self._promising():
            for head in self._heads(nodes):
                drafts += self._all_local(head)
                at_head = self._time.head(head)
                for seconds, filling, layout in self._fillings(nodes, head):
                    options.append((seconds + at_head, len(options), filling, layout, head))
        drafts += self._rounded(sorted(options, key=lambda option: option[:2]), bool(drafts))
        if self._response is None:
            drafts = self._blended(drafts)
        best: Draft | None = None
        n_drafts = _BEST_DRAFTS if self._has_few_workers() else 1
        for draft in sorted(drafts, key=lambda draft: draft.seconds)[:n_drafts]:
            better = self._improve(draft)
            if best is None or better.seconds < best.seconds:
                best = better
        return best

    def _has_few_workers(self) -> bool:
        return len(self._time.workers) <= _ALL_SUBSETS

    # Workers

    def _promising(self) -> list[tuple[int, ...]]:
        """Sets of workers, the one that is fastest at a first look first."""
        n_workers = len(self._time.workers)
        looks: dict[tuple[int, ...], float] = {}
        if n_workers <= _ALL_SUBSETS:
            for size in range(1, n_workers + 1):
                for nodes in itertools.combinations(range(n_workers), size):
                    looks[nodes] = self._first_look(nodes)
        else:
            for order in self._orders():
                self._look_along(order, looks)
        found = sorted((seconds, nodes) for nodes, seconds in looks.items() if np.isfinite(seconds))
        self._sets = [nodes for _, nodes in found]
        chosen = [nodes for _, nodes in found[:_BEST_SUBSETS]]
        if self._response is not None:
            # A first look knows nothing of quality, by which fewer workers may do.
            few = _SMALL_SIZES if n_workers <= _ALL_SUBSETS else _SMALL_SIZES[:1]
            sizes = (len(found[0][1]), *few) if found else ()
            firsts = [[nodes for _, nodes in found if len(nodes) == size][:1] for size in sizes]
            chosen = list(dict.fromkeys(itertools.chain.from_iterable(firsts)))
        return chosen

    def _look_along(self, order: list[int], looks: dict[tuple[int, ...], float]) -> None:
        """First looks at the first so many workers of an order: doubling, then around the best number."""

        def look(size: int) -> float:
            nodes = tuple(sorted(order[:size]))
            if nodes not in looks:
                looks[nodes] = self._first_look(nodes)
            return looks[nodes]

        n_workers = len(order)
        doubling = {1 << exponent for exponent in range(n_workers.bit_length()) if 1 << exponent < n_workers}
        sizes = sorted({*doubling, n_workers})
        best = min(sizes, key=look)
        step = best // 2
        while step > 1:
            step = -(-step // 2)
            near = [size for size in (best - step, best, best + step) if 1 <= size <= n_workers]
            best = min(near, key=look)

    def _orders(self) -> list[list[int]]:
        """Workers by what each alone would do for a layer, and by the memory they bring."""
        time = self._time
        travel = time.outward + time.back + time.share_overhead + time.exchange_overhead + time.slack * 0.25
        model = time.model
        half = model.n_groups / 2 * time.group
        memory = np.array([worker.device.memory_bytes for worker in time.workers], dtype=np.float64)
        keys = [
            travel + half,
            travel,
            travel - 1e-3 * np.minimum(memory / max(memory.max(), 1.0), 1.0) * half,
        ]
        return [np.argsort(key, kind="stable").tolist() for key in keys]

    def _heads(self, nodes: Sequence[int]) -> list[tuple[int, ...]]:
        """Ways to spread the head, those with the fastest token at a first look first."""
        time = self._time
        choices = head_choices(time, nodes)
        soonest = spread_head(time, nodes, None)
        if soonest is not None and self._is_roomy(soonest, nodes):
            # Nothing else than time decides.
            return choices[:1] if choices[0] == soonest else [soonest, choices[0]]
        looks = [(self._look(nodes, head, [1.0]), head) for head in choices[:_LOOKED_AT_HEADS]]
        best = [head for seconds, head in sorted(looks)[:_BEST_HEADS] if np.isfinite(seconds)]
        if self._response is not None:
            # A look knows nothing of quality, which memory for more of the groups may serve.
            n_slices = time.model.n_head_slices
            spread = [spread_head(time, nodes, own) for own in (0, n_slices // 4, n_slices)]
            best += [head for head in spread if head is not None and head not in best]
        return best

    def _is_roomy(self, head: Sequence[int], nodes: Sequence[int]) -> bool:
        """Whether the coordinator, and each of the workers, could hold all groups beside its slices."""
        room = self._room(head)
        groups = self._time.model.n_layers * self._time.model.n_groups
        return min(room[0], *(room[1 + node] for node in nodes)) >= groups

    # Layers

    def _first_look(self, nodes: tuple[int, ...]) -> float:
        """About the seconds of a token with these workers; infinite where they have too little room."""
        lengths = {1.0}
        if self._response is not None:
            lengths.add(self._time.model.n_layers / 4)
        head = spread_head(self._time, nodes, None)
        if head is None or self._room(head)[0] < self._time.model.n_layers * self._time.model.n_groups:
            # Where memory is short, the head is the first to go.
            every = self._time.model.n_head_slices
            head = spread_head(self._time, nodes, 0) or spread_head(self._time, nodes, every)
        if head is None:
            return np.inf
        return self._look(nodes, head, sorted(lengths))

    def _look(self, nodes: Sequence[int], head: Sequence[int], lengths: Sequence[float]) -> float:
        """About the seconds of a token with a head spread so, for runs of these lengths."""
        time, room = self._time, self._room(head)
        found = [
            filling.seconds
            for length in lengths
            for filling in fill(time, nodes, room, self._mode, length, quick=True)[:1]
        ]
        if self._all_local(head):
            found.append(time.alone_seconds - time.model.n_head_slices * time.own_slice)
        return min(found, default=np.inf) + time.head(head)

    def _all_local(self, head: Sequence[int]) -> list[Draft]:
        """The draft of a head spread so and all groups on the coordinator, where they fit."""
        time, model = self._time, self._time.model
        if head[0] == model.n_head_slices or self._room(head)[0] < model.n_layers * model.n_groups:
            return []
        counts = np.zeros((model.n_layers, len(head)), dtype=np.int64)
        counts[:, 0] = model.n_groups
        return [Draft(counts, tuple(head), self._every, time.token(counts, head, self._every, self._mode))]

    def _room(self, head: Sequence[int]) -> list[int]:
        time = self._time
        return group_room(time.model, time.coordinator, time.workers, head)

    def _fillings(
        self, nodes: tuple[int, ...], head: Sequence[int]
    ) -> Iterator[tuple[float, Filling, Layout]]:
        """Cuts worth rounding, whatever their quality, with their seconds, about."""
        time, room = self._time, self._room(head)
        n_layers = time.model.n_layers
        for filling in fill(time, nodes, room, self._mode)[:_BEST_FILLINGS]:
            yield filling.seconds, filling, even_layout(n_layers, filling.remote_layers)
        if self._response is None or self._patient is None:
            return
        loss = self._loss(nodes)
        for syncs in {self._response.syncs_for(cap, loss, self._quality) for cap in _SHARE_CAPS}:
            layout = Layout(tuple(range(n_layers)), (), syncs)
            for cap in _SHARE_CAPS:
                for filling in fill(
                    time, nodes, room, self._mode, layout.run_length, [n_layers], cap, quick=True
                ):
                    yield filling.seconds, filling, layout
        for seconds, layout, filling in self._patient.find(nodes, room, loss)[:_BEST_LAYOUTS]:
            yield seconds, filling, layout

    # Whole groups

    def _loss(self, nodes: Sequence[int]) -> float:
        """Share of contributions lost for good: missing at the first try and when asked for again."""
        time = self._time
        shares = [missing_share(time.model, time.workers[i].link, time.copies[i]) for i in nodes]
        return max(shares, default=0.0) ** 2

    def _keeps(self, counts: Counts, syncs: tuple[int, ...]) -> bool:
        """Whether a cut keeps the quality."""
        if self._response is None:
            return True
        shares = (1.0 - counts[:, 0] / self._time.model.n_groups).tolist()
        nodes = np.flatnonzero(counts[:, 1:].any(axis=0)).tolist()
        late = self._time.lateness(counts, syncs)
        cost = self._response.late_increase(late, shares)
        return cost + self._loss(nodes) * self._response.lost_increase(shares) <= allowance(self._quality)

    def _rounded(self, options: Sequence[_Option], has_others: bool) -> list[Draft]:
        """Drafts of the first options; where nothing else is known, at least one of any."""
        few = self._has_few_workers()
        enough, most_tried = (
            (_ENOUGH_DRAFTS, _MOST_ROUNDED) if few else (_ENOUGH_LARGE_DRAFTS, _MOST_LARGE_ROUNDED)
        )
        drafts: list[Draft] = []
        failed: Counter[tuple[Layout, int]] = Counter()
        tried = 0
        for _, _, filling, layout, head in options:
            if len(drafts) >= enough or (tried >= most_tried and (drafts or has_others)):
                break
            # What does not fit, or keep the quality, with one head seldom does with another.
            kind = (layout, round(filling.own))
            if failed[kind] >= _TRIED_HEADS:
                continue
            tried += 1
            found = list(self._round(filling, layout, head))
            failed[kind] += not found
            drafts += found
        return drafts

    def _round(self, filling: Filling, layout: Layout, head: tuple[int, ...]) -> Iterator[Draft]:
        for counts in whole_rows(filling, self._time, layout, self._room(head)):
            if layout.syncs == self._every or self._keeps(counts, layout.syncs):
                seconds = self._time.token(counts, head, layout.syncs, self._mode)
                yield Draft(counts, head, layout.syncs, seconds)

    def _blended(self, drafts: list[Draft]) -> list[Draft]:
        """For each way to spread the head the fastest draft, better where other rows mix better."""
        fastest: dict[tuple[int, ...], Draft] = {}
        for draft in sorted(drafts, key=lambda draft: draft.seconds):
            fastest.setdefault(draft.head, draft)
        blended = []
        n_heads = _BLENDED_HEADS if len(self._time.workers) <= _ALL_SUBSETS else 1
        for head, draft in itertools.islice(fastest.items(), n_heads):
            counts = blend(self._time, self._mode, draft.counts, self._sets, self._room(head))
            seconds = self._time.token(counts, head, draft.syncs, self._mode)
            blended.append(Draft(counts, head, draft.syncs, seconds))
        blended.sort(key=lambda draft: draft.seconds)
        if blended and len(self._time.workers) <= _SWAPPING_WORKERS:
            blended[0] = self._swap(blended[0])
        return blended

    def _swap(self, draft: Draft) -> Draft:
        """Slices of the head moved from one node to another, groups the other way where memory is short."""
        step = max(1, self._time.model.n_head_slices // 8)
        improved = True
        while improved:
            improved = False
            for giver, taker in itertools.permutations(range(len(draft.head)), 2):
                slices = list(draft.head)
                slices[giver] -= step
                slices[taker] += step
                room = self._room(slices)
                if slices[giver] < 0 or min(room) < 0:
                    continue
                counts = shifted(draft.counts, taker, giver, np.array(room))
                if counts is None:
                    continue
                counts = blend(self._time, self._mode, counts, self._sets, room, _SWAPPED_ROWS)
                seconds = self._time.token(counts, slices, draft.syncs, self._mode)
                if seconds < draft.seconds * (1 - 1e-6):
                    draft, improved = Draft(counts, tuple(slices), draft.syncs, seconds), True
        return draft

    def _improve(self, draft: Draft) -> Draft:
        def seconds(counts: Counts) -> float:
            if draft.syncs != self._every and not self._keeps(counts, draft.syncs):
                return np.inf
            return self._time.token(counts, draft.head, draft.syncs, self._mode)

        evaluate: Callable[[Counts], float] = seconds
        room = np.array(self._room(draft.head), dtype=np.int64)
        counts, found = improve(draft.counts, draft.seconds, room, evaluate)
        return Draft(counts, draft.head, draft.syncs, found)
