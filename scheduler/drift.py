"""When to make a new plan: measurements that wander, and hysteresis so that plans do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile, Worker

# A new plan costs a second of fetching and loading at best; less gain than this is noise.
LEAST_GAIN = 0.10
# Decisions in a row that must agree.
LEAST_AGREEMENT = 8
_GAIN = 1 / 16
_LOSS_GAIN = 1 / 256
_FASTEST = 1e13  # bytes a second; a share that took no measurable time says no more than this


class MeasuredWorker:
    """A worker's profile, kept up to date from its exchanges.

    Args:
        worker: as first measured.
        model: whose exchanges are observed.
    """

    def __init__(self, worker: Worker, model: ModelProfile) -> None:
        self._worker = worker
        travel = model.input_bytes + model.output_bytes
        self._travel = travel / worker.link.bytes_per_second
        self._round_trip = worker.link.round_trip_seconds
        self._jitter = worker.link.jitter_seconds
        self._speed = worker.device.bytes_per_second
        self._loss = worker.link.loss
        self._reliability = worker.device.reliability

    def answered(self, seconds: float, compute_seconds: float, weights: int) -> None:
        """An exchange that was asked for once.

        Args:
            seconds: from the request to the whole answer; including time in the worker's queue, so only those
                of layers that were waited for, with one request outstanding, tell the round trip.
            compute_seconds: of these, the worker's computing.
            weights: bytes that it multiplied.
        """
        if not (0 <= compute_seconds <= seconds < math.inf):
            return
        computing = max(compute_seconds - self._worker.device.overhead_seconds, weights / _FASTEST)
        if weights > 0:
            # Times are averaged, not speeds: a token takes the mean time.
            self._speed = 1 / (1 / self._speed + _GAIN * (computing / weights - 1 / self._speed))
        error = max(seconds - compute_seconds - self._travel, 0.0) - self._round_trip
        self._round_trip += _GAIN * error
        self._jitter += _GAIN * (abs(error) * math.sqrt(math.pi / 2) - self._jitter)
        self._reliability += _GAIN * (1.0 - self._reliability)

    def sent(self, datagrams: int, lost: int) -> None:
        """So many datagrams one way, of which so many were lost."""
        for number in range(min(datagrams, 1024)):
            self._loss += _LOSS_GAIN * (float(number < lost) - self._loss)

    def failed(self) -> None:
        """An exchange had no answer within the hard limit."""
        self._reliability -= _GAIN * self._reliability

    def profile(self, temperature: float | None = None, battery: float | None = None) -> Worker:
        """The worker as it is now."""
        device: DeviceProfile = replace(
            self._worker.device,
            bytes_per_second=self._speed,
            reliability=min(max(self._reliability, 0.0), 1.0),
            temperature=self._worker.device.temperature if temperature is None else temperature,
            battery=self._worker.device.battery if battery is None else battery,
        )
        link: LinkProfile = replace(
            self._worker.link,
            round_trip_seconds=self._round_trip,
            jitter_seconds=self._jitter,
            loss=min(max(self._loss, 0.0), 0.9),
        )
        return Worker(device, link)


class Drift:
    """Says when another plan is worth the change.

    Hand it, now and then, what the plan in force and the best one would take with the profiles of the moment.
    It asks for the change when the best one is faster by a tenth several times in a row, and not again before
    an interval has passed.

    Args:
        interval: least time between two changes, in the unit of `now` (seconds, or steps).
        gain: least part of the time that the new plan must save.
        agreement: times in a row that it must.
    """

    def __init__(self, interval: float, gain: float = LEAST_GAIN, agreement: int = LEAST_AGREEMENT) -> None:
        self._interval = interval
        self._gain = gain
        self._agreement = agreement
        self._agreed = 0
        self._last = -math.inf

    def consider(self, current_seconds: float, best_seconds: float, now: float) -> bool:
        """Whether to change now.

        Args:
            current_seconds: a token under the plan in force (`scheduler.plan.plan_seconds`).
            best_seconds: a token under the best plan (`scheduler.plan.make_plan`).
            now: rises from call to call.
        """
        worth_it = best_seconds < current_seconds * (1 - self._gain)
        self._agreed = self._agreed + 1 if worth_it else 0
        if self._agreed < self._agreement or now - self._last < self._interval:
            return False
        self.changed(now)
        return True

    def changed(self, now: float) -> None:
        """A plan was changed, for this or another reason."""
        self._agreed = 0
        self._last = now


def measured(workers: Sequence[Worker], model: ModelProfile) -> list[MeasuredWorker]:
    """One for each worker of a plan."""
    return [MeasuredWorker(worker, model) for worker in workers]
