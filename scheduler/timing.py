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
from typing import Literal

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
        self._runs: dict[tuple[Mode, bytes], tuple[float, tuple[int, ...]]] = {}

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
            total += self.run(counts[start:sync], mode)[0]
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
            late += self.run(counts[start:sync], "relaxed")[1]
            start = sync
        return late

    def run(self, rows: Counts, mode: Mode) -> tuple[float, tuple[int, ...]]:
        """Mean seconds of the layers between two syncs, and how late each is.

        Args:
            rows: (layers, 1 + n_workers) groups.
        """
        key = (mode, rows.tobytes())
        found = self._runs.get(key)
        if found is None:
            if len(self._runs) >= 20_000:
                self._runs.clear()
            found = self._runs[key] = self._run(rows, mode)
        return found

    def _run(self, rows: Counts, mode: Mode) -> tuple[float, tuple[int, ...]]:
        clock = 0.0
        free = np.zeros(len(self.workers))
        sent: list[Floats] = []
        answers: list[Floats] = []
        asked: list[Indices] = []
        boundaries = np.zeros(len(rows))  # when each layer is done
        arrived = np.full(len(rows), -math.inf)
        for layer, row in enumerate(rows):
            own = float(row[0]) * self.own_group
            remote = np.flatnonzero(row[1:])
            if not len(remote):
                clock += self.attention + own
                boundaries[layer] = clock
                continue
            clock += self.attention + self.overhead + float(self.exchange_overhead[remote].sum())
            begun = np.maximum(free[remote], clock + self.outward[remote])
            free[remote] = begun + self.share_overhead[remote] + row[1:][remote] * self.group[remote]
            asked.append(remote)
            sent.append(np.full(len(remote), clock))
            answers.append(free[remote] + self.back[remote])
            arrived[layer] = float((answers[-1] + LATE_MARGIN * self.jitter[remote]).max())
            clock += own
            boundaries[layer] = clock
        if not asked:
            return clock, (0,) * len(rows)
        late = np.searchsorted(boundaries, arrived) - np.arange(len(rows))
        late = np.clip(late, 0, np.arange(len(rows))[::-1])
        nodes = np.concatenate(asked)
        end = self._wait(clock, nodes, np.concatenate(sent), np.concatenate(answers), mode)
        return end, tuple(late.tolist())

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
