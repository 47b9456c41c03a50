"""What a link promises, and what it does to each packet: pure, without clock, socket or process.

A link has two directions, each with a state of its own. Random decisions come from generators seeded with
(seed, sender, receiver, purpose), so that which packets are lost does not hang on what else is switched on.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, Final

LOST: Final = -1.0  # what Direction.arrive() returns in place of a time: dropped by chance,
QUEUE_FULL: Final = -2.0  # for want of room in the queue before the bottleneck,
SILENT: Final = -3.0  # or because the link is down


@dataclass(frozen=True, slots=True)
class GilbertElliott:
    """Loss in bursts: a two-state chain that moves once a packet [Gilbert 1960, Elliott 1963].

    Attributes:
        to_bad: chance that the next packet after a good one meets the bad state.
        to_good: chance that the next packet after a bad one meets the good state; a stay in the bad state
            lasts 1 / to_good packets on average.
        loss_bad, loss_good: chance of loss in each state.
    """

    to_bad: float
    to_good: float
    loss_bad: float = 1.0
    loss_good: float = 0.0

    def __post_init__(self) -> None:
        for name in ("to_bad", "to_good", "loss_bad", "loss_good"):
            _check_chance(name, getattr(self, name))
        if self.to_bad + self.to_good == 0.0:
            raise ValueError("to_bad and to_good are both 0: the chain would never move")

    @property
    def mean_loss(self) -> float:
        """Share of packets lost in the long run."""
        bad = self.to_bad / (self.to_bad + self.to_good)
        return bad * self.loss_bad + (1.0 - bad) * self.loss_good


@dataclass(frozen=True, slots=True)
class LinkModel:
    """One direction of a link. The default promises nothing: packets pass as they come.

    Attributes:
        delay: seconds from the end of transmission to arrival.
        jitter: seconds; the delay of each packet is uniform in delay +- jitter. Order is kept: a packet waits
            for the one before it, so within a burst the longest delay so far counts.
        loss: chance that a packet is lost, independently of the others.
        bursts: loss in bursts, on top of `loss`.
        bytes_per_second: rate of the bottleneck (IP bytes); None is no limit.
        queue_bytes: room before the bottleneck; what finds it full is dropped.
        reorder: share of packets held back for `reorder_delay` seconds more, so that later ones overtake.
        duplicate: share of packets that arrive twice.
        outage_every, outage_seconds: of each `outage_every` seconds the last `outage_seconds` are silent,
            counted from the moment the link is set.
        down: nothing passes at all.
        seed: of every random decision; setting a link anew starts its generators anew.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    bursts: GilbertElliott | None = None
    bytes_per_second: float | None = None
    queue_bytes: int = 256 * 1024
    reorder: float = 0.0
    reorder_delay: float = 0.0
    duplicate: float = 0.0
    outage_every: float = 0.0
    outage_seconds: float = 0.0
    down: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("loss", "reorder", "duplicate"):
            _check_chance(name, getattr(self, name))
        for name in ("delay", "jitter", "reorder_delay", "outage_every", "outage_seconds"):
            value = getattr(self, name)
            if not 0.0 <= value <= 3600.0:
                raise ValueError(f"{name} is {value} s; it must be between 0 and 3600 s")
        if self.jitter > self.delay:
            raise ValueError(f"jitter {self.jitter} s exceeds delay {self.delay} s: packets would come early")
        if self.outage_seconds > self.outage_every:
            raise ValueError(
                f"outage_seconds {self.outage_seconds} exceeds outage_every {self.outage_every}; "
                "use down=True for a link that is never up"
            )
        if self.bytes_per_second is not None and not 0.0 < self.bytes_per_second < math.inf:
            raise ValueError(f"bytes_per_second is {self.bytes_per_second}; it must be positive, or None")
        if self.queue_bytes < 1:
            raise ValueError(f"queue_bytes is {self.queue_bytes}; it must hold at least one byte")
        if self.reorder and not self.reorder_delay:
            raise ValueError("reorder needs reorder_delay, the seconds that a packet is held back")

    @property
    def is_clean(self) -> bool:
        """Whether the link promises nothing, so that the kernel's own bridge does as well."""
        return not (
            self.delay
            or self.loss
            or self.bursts
            or self.bytes_per_second
            or self.reorder
            or self.duplicate
            or self.outage_seconds
            or self.down
        )

    def as_json(self) -> dict[str, Any]:
        """A form that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LinkModel:
        """The model that `as_json` described."""
        bursts = fields.pop("bursts")
        return cls(bursts=GilbertElliott(**bursts) if bursts else None, **fields)


def _check_chance(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; a chance lies between 0 and 1")


class Direction:
    """The state of one direction of a link, and its counters."""

    __slots__ = (
        "_bad",
        "_burst_chance",
        "_busy_until",
        "_delay_chance",
        "_duplicate_chance",
        "_last_due",
        "_loss_chance",
        "_outage_from",
        "_plain",
        "_reorder_chance",
        "_since",
        "copies",
        "delivered",
        "duplicated",
        "model",
        "octets",
        "packets",
        "reordered",
    )

    def __init__(self, model: LinkModel, source: str, destination: str, now: float) -> None:
        self.forget_counts()
        self.copies = 1  # of the packet that arrive() judged last
        self._last_due = 0.0
        self._busy_until = 0.0
        self.replace(model, source, destination, now)

    def forget_counts(self) -> None:
        """Count from zero again."""
        self.packets = self.octets = self.delivered = self.duplicated = self.reordered = 0

    def replace(self, model: LinkModel, source: str, destination: str, now: float) -> None:
        """Behave like `model` from now on; what is under way stays ahead of what follows."""

        def chance(purpose: str) -> random.Random:
            return random.Random(f"{model.seed} {source} {destination} {purpose}")

        self.model = model
        self._loss_chance = chance("loss").random
        self._burst_chance = chance("bursts").random
        self._delay_chance = chance("delay").random
        self._reorder_chance = chance("reorder").random
        self._duplicate_chance = chance("duplicate").random
        self._bad = False
        self._since = now
        self._outage_from = model.outage_every - model.outage_seconds
        self._plain = model.is_clean

    def arrive(self, now: float, size: int) -> float:
        """When the packet of `size` bytes that arrives now is due: `now` for at once.

        Returns:
            Seconds on the clock of `now`, or LOST, QUEUE_FULL or SILENT. `copies` says how many are due.
        """
        self.packets += 1
        self.octets += size
        self.copies = 1
        if self._plain:
            return now if now > self._last_due else self._last_due
        model = self.model
        if model.down or (model.outage_seconds and self._in_outage(now)):
            return SILENT
        due = now
        rate = model.bytes_per_second
        if rate:
            start = self._busy_until if self._busy_until > now else now
            if (start - now) * rate + size > model.queue_bytes:
                return QUEUE_FULL
            due = self._busy_until = start + size / rate
        # Lost packets have taken their time on the wire: loss happens behind the bottleneck.
        if (model.loss and self._loss_chance() < model.loss) or (model.bursts and self._lost_in_burst()):
            return LOST
        due += model.delay
        if model.jitter:
            due += model.jitter * (2.0 * self._delay_chance() - 1.0)
        if model.duplicate and self._duplicate_chance() < model.duplicate:
            self.copies = 2
            self.duplicated += 1
        if due < self._last_due:
            due = self._last_due
        if model.reorder and self._reorder_chance() < model.reorder:
            self.reordered += 1
            return due + model.reorder_delay
        self._last_due = due
        return due

    def _in_outage(self, now: float) -> bool:
        return (now - self._since) % self.model.outage_every >= self._outage_from

    def _lost_in_burst(self) -> bool:
        bursts = self.model.bursts
        if bursts is None:
            return False
        moves = bursts.to_good if self._bad else bursts.to_bad
        if self._burst_chance() < moves:
            self._bad = not self._bad
        return self._burst_chance() < (bursts.loss_bad if self._bad else bursts.loss_good)
