"""What a coordinator and its workers exchange for each layer, whichever way it travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.activations import ActivationForm
from edge_runtime.errors import EdgeRuntimeError

Floats = NDArray[np.float32]

PLAN_MASK = 0xFFFF  # a request names its plan by these bits of its number
MAX_LAYER = 1 << 10  # the number of layers, at most this, stands for the head
MAX_ROWS = 512
MAX_COPIES = 4
ADAPTERS_VERSION = Struct("<I")
# In which form a worker's sums may travel.
ANSWER_FORMS = (ActivationForm.F32, ActivationForm.F16, ActivationForm.Q8_0)


def content_of(inputs: bytes, version: int, values: Floats | None) -> bytes:
    """A request's content: inputs, version u32, (n_rows, width) little-endian float32.

    Args:
        inputs: in the kernel's own form.
        version: of the adapters.
        values: (n_rows, width) side values; None where the layer has no side path, or none that is used.
    """
    if values is None:
        return inputs
    return inputs + ADAPTERS_VERSION.pack(version) + np.ascontiguousarray(values, "<f4").tobytes()


class RefusalReason(IntEnum):
    """Why a worker does not answer a request."""

    PLAN = 1  # it does not hold that plan, or not that layer of it
    BUSY = 2  # more requests wait than it keeps
    FAILED = 3  # computing failed; asking again would fail again
    FORGOTTEN = 4  # the answer was given, and is no longer kept for a repeat
    SESSION = 5  # it knows no such session, after a restart for example
    INVALID = 6  # the inputs are not what the layer takes
    ADAPTERS = 7  # it does not hold that version of the adapters


class RefusedError(EdgeRuntimeError):
    """Raised by a worker's `compute` to say why it gives no answer."""

    code = "unavailable"
    exit_code = 10

    def __init__(self, reason: RefusalReason, message: str = "") -> None:
        super().__init__(message or f"a request was refused: {reason.name.lower()}")
        self.reason = reason


class Answer(NamedTuple):
    """A slice of a contribution; each comes at most once.

    Attributes:
        worker: number of the node that computed it.
        first: index of the slice's first value in the flattened (n_rows, n_out) contribution.
        values: the slice, float32, one dimension, finite, read-only.
        fragment: number of the slice, below `n_fragments`.
        compute_seconds: what computing the whole contribution took the worker.
        n_values: values of the whole contribution, n_rows * n_out.
    """

    worker: int
    step: int
    layer: int
    first: int
    values: Floats
    fragment: int
    n_fragments: int
    compute_seconds: float
    n_values: int


class Refusal(NamedTuple):
    """A worker says that no answer will come.

    Attributes:
        layer: of the request; -1 where all of the worker's requests are meant (reason SESSION, which comes
            unauthenticated: ask over the control plane before believing it).
    """

    worker: int
    step: int
    layer: int
    reason: RefusalReason


@dataclass(slots=True)
class TrafficCounts:
    """What one end of a link has sent and received; datagrams, or messages where it is a stream.

    Attributes:
        expected: that the other end has sent, as far as its counter tells.
        duplicates: copies of what had come already.
        stale: of a step that is over.
        bad: authentic, yet malformed, unasked for, of a wrong shape or with numbers that are not finite.
        forged: not made by the other end, whoever sent them.
        repeats: answers asked for again, or given again.
        refusals: requests refused.
        unsent: what the system would not send, as when the network is down.
    """

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    expected: int = 0
    duplicates: int = 0
    stale: int = 0
    bad: int = 0
    forged: int = 0
    repeats: int = 0
    refusals: int = 0
    unsent: int = 0


Inputs = bytes | memoryview
# (session, plan & PLAN_MASK, layer, n_rows, inputs as `content_of` makes them) -> (n_rows,
# n_out) float32.
# May raise RefusedError. Must not keep `inputs`; what it returns may be overwritten by its next call.
Compute = Callable[[int, int, int, int, Inputs], Floats]


class Link(Protocol):
    """The coordinator's end towards all workers of one model; used by one thread."""

    def begin_step(self, step: int) -> None:
        """Forget what earlier steps asked for; steps only grow. Answers to them count as stale."""

    def send(
        self,
        worker: int,
        step: int,
        layer: int,
        n_rows: int,
        inputs: bytes,
        *,
        plan: int,
        copies: int = 1,
        exact: bool = True,
        n_values: int = 0,
    ) -> None:
        """Ask for a contribution; once for each worker and layer of a step.

        Args:
            inputs: n_rows inputs of the layer's FFN, as `content_of` makes them.
            copies: of each datagram, both ways.
            exact: the sums come back as float32; else in a smaller form.
            n_values: values that the whole answer must have; 0: any number.

        Raises:
            RequestError: an unknown worker, a number out of range, more than the link carries.
        """

    def repeat(self, worker: int, step: int, layer: int, missing: int) -> None:
        """Ask again for the answer's fragments whose bits are set in `missing` (0 or less: all of them).

        Nothing happens where the link no longer knows the request.
        """

    def receive(self, timeout: float) -> Answer | None:
        """What has come, or comes within `timeout` seconds; 0 or less: what is there.

        None comes before the time is over where a refusal came: see `take_refusals`.
        """

    def take_refusals(self) -> list[Refusal]:
        """Refusals that came since the last call; each once, at most some hundred."""

    def ping(self, worker: int) -> None:
        """Look for a sign of life, and measure the round trip; the answer counts once `receive` ran."""

    def round_trips(self, worker: int) -> float:
        """Seconds from the last answered ping to its answer; NaN before the first."""

    def last_seen(self, worker: int) -> float:
        """When something authentic last came, `time.perf_counter` seconds; -inf before the first."""

    def statistics(self, worker: int) -> TrafficCounts:
        """Traffic with a worker so far; live."""

    def close(self) -> None:
        """End the link; nothing may be called afterwards."""
