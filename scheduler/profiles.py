"""What a plan is made from: how fast devices compute, how links behave, and how big a model's parts are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduler.errors import SchedulingError

# Beyond this a processor without a fan lowers its clock within seconds; Raspberry Pis do so from 80 C on.
HOT_CELSIUS = 80.0
LOW_BATTERY_PERCENT = 15.0
# What a hot or nearly empty device is asked for, as a part of what it measured while it was well.
STRAINED = 0.5
# Below this a worker is treated as if it had this much, so that no speed becomes zero.
_LEAST_RELIABILITY = 0.05


def _check(holds: bool, what: str, found: object, needed: str) -> None:
    if not holds:
        raise SchedulingError(f"{what} is {found}; it must be {needed}")


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value >= 0


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How fast a device computes and what it can hold.

    Attributes:
        name: for a person.
        bytes_per_second: weights that its threads multiply with one vector in a second.
        memory_bytes: bytes of weights that it may hold.
        reliability: share of exchanges that it answered, 0 to 1.
        temperature: degrees Celsius; None where it does not tell.
        battery: percent; None where it has none or runs on mains.
        overhead_seconds: fixed cost of computing one share, however small.

    Raises:
        SchedulingError: a value is out of its range.
    """

    name: str
    bytes_per_second: float
    memory_bytes: int
    reliability: float = 1.0
    temperature: float | None = None
    battery: float | None = None
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        speed = self.bytes_per_second
        _check(math.isfinite(speed) and speed > 0, f"{self.name}: bytes_per_second", speed, "positive")
        _check(self.memory_bytes >= 0, f"{self.name}: memory_bytes", self.memory_bytes, "0 or more")
        _check(0 <= self.reliability <= 1, f"{self.name}: reliability", self.reliability, "0 to 1")
        overhead = self.overhead_seconds
        _check(_is_time(overhead), f"{self.name}: overhead_seconds", overhead, "0 or more")

    @property
    def is_strained(self) -> bool:
        """Whether the device is hot or its battery nearly empty."""
        hot = self.temperature is not None and self.temperature > HOT_CELSIUS
        return hot or (self.battery is not None and self.battery < LOW_BATTERY_PERCENT)

    @property
    def planned_bytes_per_second(self) -> float:
        """The speed that a plan counts on: as measured, times the reliability, halved where strained."""
        part = max(self.reliability, _LEAST_RELIABILITY) * (STRAINED if self.is_strained else 1.0)
        return self.bytes_per_second * part


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """The way from the coordinator to a worker and back.

    Attributes:
        round_trip_seconds: mean, for a datagram, without the worker's computing.
        jitter_seconds: standard deviation of the round trip.
        bytes_per_second: of the slower direction.
        loss: share of datagrams lost, one way.
        overhead_seconds: the coordinator's CPU time for one exchange.

    Raises:
        SchedulingError: a value is out of its range.
    """

    round_trip_seconds: float
    jitter_seconds: float = 0.0
    bytes_per_second: float = 1.25e8
    loss: float = 0.0
    overhead_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("round_trip_seconds", "jitter_seconds", "overhead_seconds"):
            _check(_is_time(getattr(self, name)), name, getattr(self, name), "0 or more")
        speed = self.bytes_per_second
        _check(speed > 0 and not math.isnan(speed), "a link's bytes_per_second", speed, "positive")
        _check(0 <= self.loss < 1, "loss", self.loss, "at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Worker:
    """A device that computes for the coordinator, and the link to it."""

    device: DeviceProfile
    link: LinkProfile


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Sizes of a model's parts, in bytes of weights, and of what travels for one row (token).

    Attributes:
        n_layers: layers.
        n_groups: neuron groups in a layer.
        group_bytes: gate, up and down of one group.
        attention_bytes: attention and norms of one layer; always on the coordinator.
        head_bytes: the LM head.
        n_head_slices: row slices that the head can be cut into.
        fixed_bytes: embeddings and norms; always on the coordinator, and not multiplied with.
        input_bytes: a request's activations.
        output_bytes: an answer's sums.
        group_neurons: hidden neurons of a group.
        head_slice_output_bytes: logits of one slice of the head.
        datagram_bytes: activations that fit one datagram.

    Raises:
        SchedulingError: a value is out of its range.
    """

    n_layers: int
    n_groups: int
    group_bytes: int
    attention_bytes: int
    head_bytes: int
    n_head_slices: int
    fixed_bytes: int
    input_bytes: int
    output_bytes: int
    group_neurons: int
    head_slice_output_bytes: int = 0
    datagram_bytes: int = 1280

    def __post_init__(self) -> None:
        for name in (
            "n_layers",
            "n_groups",
            "group_bytes",
            "n_head_slices",
            "group_neurons",
            "datagram_bytes",
        ):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("attention_bytes", "head_bytes", "fixed_bytes", "input_bytes", "output_bytes"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(
            self.head_slice_output_bytes >= 0, "head_slice_output_bytes", self.head_slice_output_bytes, "0+"
        )

    @property
    def head_slice_bytes(self) -> float:
        """Weights of one slice of the head."""
        return self.head_bytes / self.n_head_slices

    @property
    def coordinator_bytes(self) -> int:
        """What the coordinator holds in any plan."""
        return self.n_layers * self.attention_bytes + self.fixed_bytes

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        groups = self.n_layers * self.n_groups * self.group_bytes
        return self.coordinator_bytes + groups + self.head_bytes

    @property
    def input_fragments(self) -> int:
        """Datagrams of a request."""
        return max(1, -(-self.input_bytes // self.datagram_bytes))

    @property
    def output_fragments(self) -> int:
        """Datagrams of an answer."""
        return max(1, -(-self.output_bytes // self.datagram_bytes))
