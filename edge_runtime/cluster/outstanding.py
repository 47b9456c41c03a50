"""What workers owe to the token in progress: asked for, folded in, asked for again, or computed here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.exchange import Answer, Link, RefusalReason
from edge_runtime.cluster.pending import Pending
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.step_times import StepTimes
from edge_runtime.cluster.worker_health import WorkerHealth
from scheduler.deadlines import Tails
from scheduler.drift import MeasuredWorker

Floats = NDArray[np.float32]

_log = logging.getLogger("edgert.cluster")

# Longest wait for a worker, whatever was measured: what a person notices.
LONGEST_WAIT = 0.25
# How much longer to wait for what is computed here from the model's file.
_FROM_FILE = 2.0
# A worker that gave nothing of use for so long while it was asked is left alone for a while, whatever else it
# said. What it owes is computed here well before that.
_USELESS_SECONDS = 0.1
# A sum of squares beyond this is of no model's activations.
_LARGEST_SQUARE = 1e12
# A contribution is held against one computed here, which sums in the same order; answers of relaxed requests
# travel with 8 bits.
_TOLERANCE = {True: 1e-3, False: 3e-2}
# A contribution is let go on its deadline only where that costs so little of a token's bound; plans leave
# a fifth of it for all such events.
_CHEAP = 0.05
# Answers in a row that came after a second request only: so many are bad luck, those beyond lengthen the time
# until one is asked for again, up to so many attempts' worth, which is eleven times as long.
_LOST_IN_A_ROW = 2
_MOST_BACKED_OFF = 6
_BAD_DATAGRAMS = 3  # sealed ones that cannot be right, after which a worker is expelled


class Record(Protocol):
    """Told of every fragment that is folded in (or lost), for experiments.

    Args:
        fragment: its number; -1 for the rest of the contribution, which was computed here.
        by: layers that it is late; -1: lost.
    """

    def __call__(self, layer: int, worker: int, fragment: int, n_fragments: int, by: int, /) -> None: ...


class Outstanding:
    """The contributions that one token waits for. Begin each token with `begin`.

    Attributes:
        totals: what became of all contributions since the start.
        compared: workers of whose contributions to this token one was held against one computed here.
        record: who is told of each; None for nobody.
    """

    def __init__(
        self,
        link: Link,
        tails: Tails,
        health: Sequence[WorkerHealth],
        times: StepTimes,
        names: Sequence[str],
        measured: Sequence[MeasuredWorker] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._link = link
        self._tails = tails
        self._health = health
        self._times = times
        self._names = names  # of the nodes, for the log
        self._measured = measured
        self._clock = clock
        self._pending: dict[tuple[int, int], Pending] = {}
        self._blocking = False
        self._asked_since: dict[int, float] = {}  # first request that nothing of use came after
        self._useful: dict[int, float] = {}  # when something did
        self._in_a_row: dict[int, int] = {}  # answers that came after a second request only
        self.step = 0
        self.totals = Contributions()
        self.compared: set[int] = set()
        self.record: Record | None = None
        self._boundary = 0

    def begin(
        self,
        step: int,
        shares: PlanShares,
        requests: Sequence[Contributions],
        *,
        exact: bool,
        syncs: Sequence[int],
    ) -> None:
        """A new token of these requests, with its sync boundaries: what is on its way belongs to the past."""
        self._syncs = syncs
        self.step = step
        self._link.begin_step(self.step)
        self._pending.clear()
        self.compared.clear()
        self._shares = shares
        self._requests = requests
        self._counted = (*requests, self.totals)
        self._exact = exact

    def begin_head(self, step: int, shares: PlanShares) -> None:
        """The head of the same token: always waited for, and counted for nobody."""
        if step != self.step:  # a prompt's, whose layers went over streams
            self._link.begin_step(step)
            self.compared.clear()
        self.step, self._shares = step, shares
        self._requests = self._counted = ()
        self._exact = True

    # --- asking -------------------------------------------------------------------------------

    def ask(self, pending: Pending, content: bytes) -> None:
        """Ask a worker for a contribution; `content` is what it is told."""
        self._pending[pending.layer, pending.worker] = pending
        useful = self._useful.get(pending.worker, -math.inf)
        if useful >= self._asked_since.get(pending.worker, -math.inf):
            self._asked_since[pending.worker] = pending.asked
        plan = self._shares.plan
        self._link.send(
            pending.worker,
            self.step,
            pending.layer,
            len(pending.inputs),
            content,
            plan=plan.number,
            copies=plan.copies[pending.worker - 1],
            exact=self._exact,
            n_values=pending.target.size,
        )

    def resend_after(self, worker: int, attempts: int = 0) -> float:
        """Seconds after which to ask a worker again.

        It is unknown which request an answer belongs to that was asked for twice, so its time is not learned
        from. Where the first guess is too short that would be every answer's: so once several in a row were,
        the time grows until an answer comes at the first request (the other half of Karn's algorithm). One
        or two tell of datagrams that got lost.
        """
        backed_off = min(max(self._in_a_row.get(worker, 0) - _LOST_IN_A_ROW, 0), _MOST_BACKED_OFF)
        return self._tails.resend_after(worker, attempts + backed_off)

    def _ask_again(self, pending: Pending, now: float) -> None:
        pending.attempts += 1
        pending.resend = now + self.resend_after(pending.worker, pending.attempts)
        self._link.repeat(pending.worker, self.step, pending.layer, pending.missing)
        self._times.repeats += 1

    # --- what arrives -------------------------------------------------------------------------

    def collect(self, boundary: int) -> None:
        """Take in what is there, and ask again for what should be."""
        self._boundary = boundary
        while self._pending:
            answer = self._link.receive(0.0)
            if answer is None:
                break
            self._fold(answer)
        if self._pending:
            now = self._clock()
            for pending in self._pending.values():
                if now >= pending.resend:
                    self._ask_again(pending, now)

    def _fold(self, answer: Answer) -> None:
        pending = self._pending.get((answer.layer, answer.worker))
        if pending is None or answer.step != self.step:
            return
        if not float(answer.values @ answer.values) < _LARGEST_SQUARE:
            self.expel(answer.worker, f"values of no model's for layer {answer.layer}")
            return
        if not pending.fold(answer.first, answer.values, answer.fragment, answer.n_fragments):
            return
        self._useful[answer.worker] = self._clock()
        part = len(answer.values) / pending.target.size
        by = self._boundary - answer.layer - 1
        for request in self._counted:
            request.came(answer.layer, part, pending.share, by)
        if self.record is not None:
            self.record(answer.layer, answer.worker, answer.fragment, answer.n_fragments, by)
        if pending.complete:
            del self._pending[answer.layer, answer.worker]
            took = self._clock() - pending.asked
            self._times.transfer(answer.layer, took - answer.compute_seconds)
            again = pending.attempts > 0
            self._in_a_row[answer.worker] = self._in_a_row.get(answer.worker, 0) + 1 if again else 0
            # An answer that lay here while this device computed tells nothing about the network.
            if not again and self._blocking:
                self._observe(pending, took, answer.compute_seconds)
            if pending.checked:
                self._check(pending)

    def _observe(self, pending: Pending, took: float, compute_seconds: float) -> None:
        """Learn from an exchange that was waited for."""
        worker = pending.worker
        self._tails.observe(worker, took)
        # With others outstanding it may have waited its turn at the worker.
        if self._measured is not None and not any(other == worker for _, other in self._pending):
            weights = self._shares.weights_of(pending.layer, worker)
            self._measured[worker - 1].answered(took, compute_seconds, weights)

    def _heed_refusals(self) -> None:
        """Compute here what workers say they will not answer."""
        for refusal in self._link.take_refusals():
            pending = self._pending.get((refusal.layer, refusal.worker))
            # One without a layer is not authentic; a busy worker is asked again when the time comes.
            if pending is None or refusal.step != self.step or refusal.reason is RefusalReason.BUSY:
                continue
            if refusal.reason is RefusalReason.FORGOTTEN:
                self._recompute(pending)
            else:
                _log.warning("%s refuses: %s", self._names[refusal.worker], refusal.reason.name.lower())
                self.fail(refusal.worker)

    def _check(self, pending: Pending) -> None:
        """Hold a contribution against one computed here, before it reaches the residual stream."""
        own = self._computed_here(pending).reshape(-1)
        assert pending.apart is not None
        difference = float(np.abs(pending.apart - own).max(initial=0))
        if difference <= _TOLERANCE[self._exact] * max(float(np.abs(own).max(initial=0)), 1e-6):
            pending.settle()
            self.compared.add(pending.worker)
            return
        pending.complete_with(own)
        self.expel(
            pending.worker,
            f"its contribution of layer {pending.layer} differs by {difference:.3g} from the right one",
        )

    # --- waiting ------------------------------------------------------------------------------

    def wait(self, boundary: int, *, final: bool) -> None:
        """Wait for what is outstanding: for all of it if the token is exact, else up to the deadlines.

        Args:
            final: no later boundary follows in this token.
        """
        self._boundary = boundary
        self._blocking = True
        try:
            while self._pending:
                wake = self._act_on_time(final=final)
                if wake is None:
                    return
                answer = self._link.receive(max(wake - self._clock(), 0.0))
                if answer is None:
                    self._heed_refusals()
                while answer is not None:  # fragments come together
                    self._fold(answer)
                    answer = self._link.receive(0.0) if self._pending else None
        finally:
            self._blocking = False

    def _act_on_time(self, *, final: bool) -> float | None:
        """Ask again or compute here what is due; when to do so next, None if nothing is waited for."""
        now = self._clock()
        wake: float | None = None
        for pending in list(self._pending.values()):
            if (pending.layer, pending.worker) not in self._pending:
                continue  # its worker failed meanwhile
            limit = pending.asked + self._limit(pending)
            if now >= limit or self._health[pending.worker].expelled:
                self._overdue(pending)
                continue
            if now >= pending.resend:
                self._ask_again(pending, now)
            due = min(limit, pending.resend)
            if not self._exact and self._may_wait_for_later(pending, final=final):
                deadline = pending.asked + self._tails.deadline(pending.worker)
                if now >= deadline:
                    continue
                due = min(due, deadline)
            wake = due if wake is None else min(wake, due)
        return wake

    def _limit(self, pending: Pending) -> float:
        """Seconds after which a contribution is computed here: sooner where its weights are in memory."""
        limit = self._tails.hard_limit(pending.worker)
        if not self._shares.is_resident(pending.layer, pending.worker):
            limit *= _FROM_FILE
        return min(limit, LONGEST_WAIT)

    def _may_wait_for_later(self, pending: Pending, *, final: bool) -> bool:
        """Whether it costs every request little if this comes at the next boundary, or never."""
        share = pending.share * pending.part_missing
        by = self._boundary - pending.layer - 1
        later = next((sync for sync in self._syncs if sync > self._boundary), self._boundary)
        for request in self._requests:
            meter = request.meter
            if meter is None:
                return False
            price = (
                meter.price_lost(pending.layer, share)
                if final
                else meter.price_late(pending.layer, share, later - pending.layer - 1)
            )
            if price - meter.price_late(pending.layer, share, by) > _CHEAP * meter.bound:
                return False
        return True

    def _overdue(self, pending: Pending) -> None:
        """Compute here what a worker owes: this alone, or everything if it seems to be gone."""
        worker = pending.worker
        if self._link.statistics(worker).bad >= _BAD_DATAGRAMS:
            self.expel(worker, "sealed answers that cannot be right: not finite, or of a wrong shape")
            return
        since = self._asked_since.get(worker, -math.inf)
        useless = self._useful.get(worker, -math.inf) < since and self._clock() - since > _USELESS_SECONDS
        if useless and not self._health[worker].expelled:
            self.fail(worker)
        else:
            self._recompute(pending)

    # --- workers that do not answer -----------------------------------------------------------

    def fail(self, worker: int) -> None:
        """Do without a worker for a while; what it owes is computed here."""
        self._health[worker].fail(self._clock())
        self._asked_since.pop(worker, None)
        if self._measured is not None:
            self._measured[worker - 1].failed()
        _log.warning("%s does not answer; its groups are computed here", self._names[worker])
        self._recompute_all(worker)

    def expel(self, worker: int, reason: str) -> None:
        """Never ask a worker again; what it owes is computed here."""
        self._health[worker].expel(reason)
        _log.error("%s is not asked any more: %s", self._names[worker], reason)
        self._recompute_all(worker)

    def _recompute_all(self, worker: int) -> None:
        for layer, of in list(self._pending):
            if of == worker:
                self._recompute(self._pending[layer, of])

    def _recompute(self, pending: Pending) -> None:
        self._pending.pop((pending.layer, pending.worker), None)
        self.count_recomputed(pending.part_missing)
        if self.record is not None:
            self.record(pending.layer, pending.worker, -1, 0, self._boundary - pending.layer - 1)
        pending.complete_with(self._computed_here(pending))

    def _computed_here(self, pending: Pending) -> Floats:
        return self._shares.compute(pending.layer, pending.worker, pending.inputs, pending.values)

    def count_recomputed(self, part: float) -> None:
        """So much of a contribution was computed here in a worker's place."""
        for request in self._counted:
            request.recomputed += part

    def give_up(self) -> None:
        """At the end of the token: what is still outstanding is lost."""
        for pending in self._pending.values():
            pending.settle()
            for request in self._counted:
                request.went_missing(pending.layer, pending.part_missing, pending.share)
            if self.record is not None:
                pending.each_missing(self.record)
        self._pending.clear()
