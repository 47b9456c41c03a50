"""What happened to the contributions of other devices, for one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.patience import Meter

MAX_LATE = 8  # lateness is counted up to this many layers; more counts as this much


@dataclass(slots=True, eq=False)
class Contributions:
    """A request's wish for quality, and what it got.

    A contribution is what one worker computes of one layer for one token. One that came in parts counts as
    its parts.

    Attributes:
        quality: 1: wait for everything (`exact`); 0.99: a perplexity at most 1 % worse (`relaxed`).
        on_time: contributions that were there when the next layer began.
        late: late[k - 1] of them came k layers later.
        lost: never came within their token.
        recomputed: computed by the coordinator in a worker's place.
        meter: adds up what they cost; None until the request runs relaxed.
        fell_back: the bound was reached, and tokens were computed exactly until there was room again.
    """

    quality: float = 1.0
    on_time: float = 0.0
    late: list[float] = field(default_factory=lambda: [0.0] * MAX_LATE)
    lost: float = 0.0
    recomputed: float = 0.0
    meter: Meter | None = None
    fell_back: bool = False

    @property
    def exact(self) -> bool:
        """Whether its next token must be computed exactly."""
        exceeded = self.meter is not None and self.meter.exceeded
        self.fell_back |= exceeded
        return exceeded or self.quality >= 1.0

    def came(self, layer: int, part: float, share: float, by: int) -> None:
        """A part (0 to 1) of a contribution, itself a share of the layer's groups, came `by` layers late."""
        if by <= 0:
            self.on_time += part
            return
        self.late[min(by, MAX_LATE) - 1] += part
        if self.meter is not None:
            self.meter.late(layer, part * share, by)

    def went_missing(self, layer: int, part: float, share: float) -> None:
        """A part of a contribution never came."""
        self.lost += part
        if self.meter is not None:
            self.meter.lost(layer, part * share)

    def end_token(self) -> None:
        """A token is finished."""
        if self.meter is not None:
            self.meter.end_token()
