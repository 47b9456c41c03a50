"""How long to wait for a worker: running estimates of the tail of its exchanges.

Smoothed mean and mean deviation as RFC 6298 has them for TCP's retransmission timer, and a histogram with
logarithmic bins, which forgets, for the 99th percentile.
"""

from __future__ import annotations

import math

# RFC 6298: SRTT <- 7/8 SRTT + 1/8 R, RTTVAR <- 3/4 RTTVAR + 1/4 |SRTT - R|, RTO = SRTT + 4 RTTVAR.
_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
DEVIATIONS = 4.0
# Timers of the kernel and of Python wake this much late; less slack would ask again for what is on its way.
LEAST_SLACK = 0.0005
# Floors and caps, seconds. A resend before 1 ms costs more than it saves; one after 0.5 s is a dead link.
RESEND_FLOOR, RESEND_CAP = 0.001, 0.5
# A deadline shorter than this would count scheduling noise as loss; one longer than 0.25 s is felt.
DEADLINE_FLOOR, DEADLINE_CAP = 0.001, 0.25
# Past this the coordinator computes the groups itself. Five milliseconds cost less than most layers' share.
HARD_FLOOR, HARD_CAP = 0.005, 0.5
# Each further request for the same answer waits this much longer than the one before.
BACKOFF = 1.5
_BINS_PER_DOUBLING = 8
_FIRST_BIN = 2e-5  # seconds
_N_BINS = 160  # up to 20 s
# Samples after which all counts are halved, so that old ones fade.
_WINDOW = 1024
# Until a worker was measured: an exchange of this many seconds is assumed.
FIRST_GUESS = 0.1


class Tail:
    """Exchange times of one worker, the request's sending to the last answer, computing included.

    Exchanges that were asked for twice must not be observed: it is unknown which request was answered
    (Karn's rule).

    Args:
        expected: seconds, from a plan or a probe; None where nothing is known.
    """

    __slots__ = ("_bins", "_total", "deviation", "mean", "samples")

    def __init__(self, expected: float | None = None) -> None:
        self.mean = FIRST_GUESS if expected is None else expected
        self.deviation = self.mean / 2
        self.samples = 0
        self._bins = [0.0] * _N_BINS
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """An exchange took so long; what is not a time is ignored."""
        if not 0 <= seconds < math.inf:
            return
        if self.samples == 0:
            self.mean = seconds
            self.deviation = seconds / 2
        else:
            error = seconds - self.mean
            self.deviation += _DEVIATION_GAIN * (abs(error) - self.deviation)
            self.mean += _MEAN_GAIN * error
        self.samples += 1
        self._bins[_bin_of(seconds)] += 1.0
        self._total += 1.0
        if self._total >= _WINDOW:
            self._bins = [count / 2 for count in self._bins]
            self._total /= 2

    def percentile(self, share: float) -> float:
        """Seconds within which a share of the exchanges ended, at most one bin (9 %) too long."""
        wanted = share * self._total
        for number, count in enumerate(self._bins):
            wanted -= count
            if wanted <= 1e-9 and self._total:
                return float(_FIRST_BIN * 2 ** ((number + 1) / _BINS_PER_DOUBLING))
        return self.mean + DEVIATIONS * self.deviation

    @property
    def slack(self) -> float:
        """Seconds beyond the mean after which an answer is overdue."""
        return max(DEVIATIONS * self.deviation, LEAST_SLACK)

    def resend_after(self, attempt: int = 0) -> float:
        """Seconds after which to ask again; longer with each attempt."""
        seconds = (self.mean + self.slack) * BACKOFF ** min(attempt, 8)
        return min(max(seconds, RESEND_FLOOR), RESEND_CAP)

    def deadline(self) -> float:
        """Seconds after a request at which a layer that may go on without the answer does.

        The 99th percentile, but never more than the mean and four deviations: a few stragglers must not make
        all others wait.
        """
        overdue = self.mean + self.slack
        seconds = min(self.percentile(0.99), overdue) if self.samples >= 32 else overdue
        return min(max(seconds, self.mean + LEAST_SLACK, DEADLINE_FLOOR), DEADLINE_CAP)

    def hard_limit(self) -> float:
        """Seconds after a request at which the coordinator computes it itself: two resends in vain."""
        seconds = self.resend_after(0) + self.resend_after(1) + self.mean + self.slack
        return min(max(seconds, HARD_FLOOR), HARD_CAP)


class Tails:
    """One `Tail` for each worker; workers are numbered from 1, as in a plan.

    Args:
        expected: seconds of one exchange with each worker; None where nothing is known.
    """

    __slots__ = ("workers",)

    def __init__(self, expected: list[float | None]) -> None:
        self.workers = [Tail(seconds) for seconds in expected]

    def observe(self, worker: int, seconds: float) -> None:
        """An exchange with a worker, asked for once, took so long."""
        self.workers[worker - 1].observe(seconds)

    def p99(self, worker: int) -> float:
        """See `Tail.percentile`."""
        return self.workers[worker - 1].percentile(0.99)

    def resend_after(self, worker: int, attempt: int = 0) -> float:
        """See `Tail.resend_after`."""
        return self.workers[worker - 1].resend_after(attempt)

    def deadline(self, worker: int) -> float:
        """See `Tail.deadline`."""
        return self.workers[worker - 1].deadline()

    def hard_limit(self, worker: int) -> float:
        """See `Tail.hard_limit`."""
        return self.workers[worker - 1].hard_limit()


def _bin_of(seconds: float) -> int:
    if seconds <= _FIRST_BIN:
        return 0
    return min(int(math.log2(seconds / _FIRST_BIN) * _BINS_PER_DOUBLING), _N_BINS - 1)
