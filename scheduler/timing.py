"""How long a token takes under a plan: the model of time that planning minimises.

Between two sync boundaries the coordinator runs layer after layer: it computes the attention, sends the
layer's requests, computes its own groups. A worker takes requests in turn. At a sync boundary the coordinator
waits for all that is outstanding; with a sync after each layer that is

    attention + overheads + max(own groups, link + worker's groups)

for each layer. Jitter and loss enter as the expected largest of all arrivals (`scheduler.waiting`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.datagrams import incomplete, link_copies
from scheduler.deadlines import DEVIATIONS, LEAST_SLACK
from scheduler.profiles import DeviceProfile, ModelProfile, Worker
from scheduler.waiting import MEAN_DEVIATION, expected_end

# Jitter that lateness allows for: two standard deviations, which 98 of 100 answers keep to.
LATE_MARGIN = 2.0

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mode = Literal["exact", "relaxed"]


_MOST_RUNS = 20_000  # that are remembered


class _Exchange(NamedTuple):
    """What a layer's workers are asked: when, and when their answers are there (n,), in the mean."""

    layer: int
    nodes: Indices
    sent: float
    answers: Floats


class _Run:
    """The layers between two syncs: when each is done, (n_layers,), and what they ask of workers.

    Attributes:
        seconds: mean seconds until all contributions are there, by mode, where they are known.
    """

    __slots__ = ("_late", "boundaries", "exchanges", "seconds")

    def __init__(self, n_layers: int) -> None:
        self.boundaries = np.zeros(n_layers)
        self.exchanges: list[_Exchange] = []
        self.seconds: dict[Mode, float] = {}
        self._late: list[int] | None = None

    def lateness(self, time: TimeModel) -> list[int]:
        """By how many layers each layer's slowest contribution is late, at most by those left."""
        if self._late is None:
            n_layers = len(self.boundaries)
            self._late = [0] * n_layers
            for layer, nodes, _, answers in self.exchanges:
                arrived = float((answers + LATE_MARGIN * time.jitter[nodes]).max())
                late = int(np.searchsorted(self.boundaries, arrived)) - layer
                self._late[layer] = min(max(late, 0), n_layers - 1 - layer)
        return self._late


class TimeModel:
    """Seconds of a token for numbers of groups on each node.

    Attributes:
        attention, own_group, own_slice: coordinator's seconds for a layer's attention, for one group, for one
            slice of the head.
        overhead: coordinator's seconds for each layer that is cut into pieces.
        outward, back: (n_workers,) seconds of travel of a request and of an answer.
        head_travel: (n_workers,) seconds of travel for a part of the head, the logits' own left out.
        group, slice_: (n_workers,) seconds of one group, of one slice of the head with its logits' travel.
        share_overhead: (n_workers,) seconds of any share.
        exchange_overhead: (n_workers,) coordinator's seconds for an exchange.
        jitter: (n_workers,) standard deviation of the round trip.
        missing, missing_again: (n_workers,) chance that an exchange, or a repeated one, is incomplete.
        slack: (n_workers,) seconds beyond the mean after which an answer is asked for again.
        copies: datagram copies for each worker.
    """

    def __init__(self, model: ModelProfile, coordinator: DeviceProfile, workers: Sequence[Worker]) -> None:
        self.model = model
        self.coordinator = coordinator
        self.workers = tuple(workers)
        own = coordinator.planned_bytes_per_second
        self.attention = model.attention_bytes / own
        self.own_group = model.group_bytes / own
        self.own_slice = model.head_slice_bytes / own
        self.overhead = coordinator.overhead_seconds
        links = [worker.link for worker in workers]
        self.copies = tuple(link_copies(model, link) for link in links)
        speed = np.array([worker.device.planned_bytes_per_second for worker in workers])
        # A copy is sent behind the datagram that it copies.
        pairs = list(zip(links, self.copies, strict=True))
        width = np.array([link.bytes_per_second / copies for link, copies in pairs])
        half = np.array([link.round_trip_seconds for link in links]) / 2
        self.outward: Floats = half + model.input_bytes / width
        self.back: Floats = half + model.output_bytes / width
        self.head_travel: Floats = self.outward + half
        self.group: Floats = model.group_bytes / speed
        self.slice_: Floats = model.head_slice_bytes / speed + model.head_slice_output_bytes / width
        self.share_overhead: Floats = np.array([worker.device.overhead_seconds for worker in workers])
        self.exchange_overhead: Floats = np.array([link.overhead_seconds for link in links])
        self.jitter: Floats = np.array([link.jitter_seconds for link in links])
        fragments = model.input_fragments + model.output_fragments
        self.missing: Floats = np.array([incomplete(link.loss, fragments, copies) for link, copies in pairs])
        # What is asked for again is the request and, mostly, one fragment of the answer.
        again = model.input_fragments + 1
        losses = [incomplete(link.loss, again, copies) for link, copies in pairs]
        self.missing_again: Floats = np.array(losses)
        self.slack: Floats = np.maximum(DEVIATIONS * MEAN_DEVIATION * self.jitter, LEAST_SLACK)
        self._runs: dict[bytes, _Run] = {}

    @property
    def alone_seconds(self) -> float:
        """A token on the coordinator by itself, whether it fits or not."""
        model = self.model
        layer = self.attention + model.n_groups * self.own_group
        return model.n_layers * layer + model.n_head_slices * self.own_slice

    def token(self, counts: Counts, head: Sequence[int], syncs: Sequence[int], mode: Mode) -> float:
        """Mean seconds of a token.

        Args:
            counts: (n_layers, 1 + n_workers) groups of each layer on each node.
            head: slices of the head on each node.
            syncs: rising boundaries at which everything is waited for, the last n_layers.
            mode: `exact` waits however long it takes; `relaxed` up to a deadline.
        """
        total, start = 0.0, 0
        for sync in syncs:
            total += self.run_seconds(counts[start:sync], mode)
            start = sync
        return total + self.head(head)

    def lateness(self, counts: Counts, syncs: Sequence[int]) -> list[int]:
        """By how many layers each layer's slowest contribution is late, as a rule.

        It is folded in at the first boundary after it arrived, or at its next sync. Arrivals are taken
        `LATE_MARGIN` standard deviations after their mean.
        """
        late: list[int] = []
        start = 0
        for sync in syncs:
            late += self._run(counts[start:sync]).lateness(self)
            start = sync
        return late

    def run_seconds(self, rows: Counts, mode: Mode) -> float:
        """Mean seconds of the layers between two syncs.

        Args:
            rows: (layers, 1 + n_workers) groups.
        """
        run = self._run(rows)
        if mode not in run.seconds:
            run.seconds[mode] = self._end(run, mode)
        return run.seconds[mode]

    def _run(self, rows: Counts) -> _Run:
        key = rows.tobytes()
        found = self._runs.get(key)
        if found is None:
            if len(self._runs) >= _MOST_RUNS:
                self._runs.clear()
            found = self._runs[key] = self._walk(rows)
        return found

    def _walk(self, rows: Counts) -> _Run:
        """The coordinator's way through the layers between two syncs."""
        clock = 0.0
        free = np.zeros(len(self.workers))
        run = _Run(len(rows))
        for layer, row in enumerate(rows):
            own = float(row[0]) * self.own_group
            remote = np.flatnonzero(row[1:])
            clock += self.attention
            if len(remote):
                clock += self.overhead + float(self.exchange_overhead[remote].sum())
                begun = np.maximum(free[remote], clock + self.outward[remote])
                free[remote] = begun + self.share_overhead[remote] + row[1:][remote] * self.group[remote]
                run.exchanges.append(_Exchange(layer, remote, clock, free[remote] + self.back[remote]))
            clock += own
            run.boundaries[layer] = clock
        return run

    def _end(self, run: _Run, mode: Mode) -> float:
        """Mean of the time at which a run's contributions are there."""
        clock = float(run.boundaries[-1])
        if not run.exchanges:
            return clock
        nodes = np.concatenate([exchange.nodes for exchange in run.exchanges])
        sent = np.concatenate([np.full(len(exchange.nodes), exchange.sent) for exchange in run.exchanges])
        answers = np.concatenate([exchange.answers for exchange in run.exchanges])
        return self._wait(clock, nodes, sent, answers, mode)

    def _wait(self, start: float, asked: Indices, sent: Floats, answers: Floats, mode: Mode) -> float:
        slack = self.slack[asked]
        latest = float((answers + slack).max()) if mode == "relaxed" else math.inf
        missing, again = self.missing[asked], self.missing_again[asked]
        resend = answers - sent + slack
        return expected_end(start, answers, self.jitter[asked], missing, again, resend, latest)

    def head(self, slices: Sequence[int]) -> float:
        """Mean seconds of the head; its slices are waited for in any mode."""
        held = np.asarray(slices[1:], dtype=np.int64)
        remote = np.flatnonzero(held)
        own = slices[0] * self.own_slice
        if not len(remote):
            return own
        clock = self.overhead + float(self.exchange_overhead[remote].sum())
        computing = self.share_overhead[remote] + held[remote] * self.slice_[remote]
        answers = clock + self.head_travel[remote] + computing
        return self._wait(clock + own, remote, np.full(len(remote), clock), answers, "exact")
