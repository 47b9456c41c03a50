"""How fast the way between two members is, from echoes over one gRPC stream."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from typing import Any, NamedTuple

import grpc

from edge_runtime.errors import UnavailableError
from edge_runtime.v1 import cluster_pb2 as wire

PINGS = 20
PING_SECONDS = 0.4  # for all pings
WHOLE_SECONDS = 1.0
_WARM_UPS = 2  # the first echoes pay for the stream's opening
_PING_BYTES = 32
# Growing, so that a slow link is measured with what fits into the time; the largest twice, as a connection
# finds its speed only while it is used.
_ECHOES = (16 << 10, 64 << 10, 256 << 10, 256 << 10, 256 << 10)


class LinkMeasurement(NamedTuple):
    """A link as a stream sees it.

    Attributes:
        round_trip_seconds: median of small echoes, both programs' own time included.
        jitter_seconds: their standard deviation.
        bytes_per_second: one way, from the largest echoes that fitted into the time.
    """

    round_trip_seconds: float
    jitter_seconds: float
    bytes_per_second: float


async def measure_link(stub: Any) -> LinkMeasurement:
    """Measure over a connection that stands.

    Args:
        stub: of the member's Cluster service, for an event loop.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        UnavailableError: not even small echoes came back in time, or they came back changed.
    """
    loop = asyncio.get_running_loop()
    call = stub.Measure(timeout=WHOLE_SECONDS * 4)
    end = loop.time() + WHOLE_SECONDS
    try:
        times = await _ping(call, loop)
        round_trip = statistics.median(times)
        fastest = await _transfer(call, loop, end, round_trip)
    finally:
        call.cancel()
    return LinkMeasurement(round_trip, statistics.pstdev(times), fastest)


async def _ping(call: Any, loop: asyncio.AbstractEventLoop) -> list[float]:
    times: list[float] = []
    end = loop.time() + PING_SECONDS
    content = bytes(_PING_BYTES)
    # A link of seconds gets its two warm-ups and one ping, however long they take.
    for number in range(_WARM_UPS + PINGS):
        if times and loop.time() > end:
            break
        took = await _echo(call, loop, content)
        if number >= _WARM_UPS:
            times.append(took)
    return times


async def _transfer(call: Any, loop: asyncio.AbstractEventLoop, end: float, round_trip: float) -> float:
    """Bytes per second one way: an echo of n bytes takes a round trip and twice the time of n bytes."""
    fastest, last = 0.0, 0.0
    for size in _ECHOES:
        begun = loop.time()
        if last and begun + last > end:
            break
        try:
            async with asyncio.timeout_at(max(end, begun + round_trip)):
                last = await _echo(call, loop, bytes(size))
        except TimeoutError:
            # Slower than this: nothing came back in the time there was.
            slow = 2 * size / max(loop.time() - begun, 1e-6)
            return min(fastest, slow) if fastest else slow
        fastest = max(fastest, 2 * size / max(last - round_trip, last / 16, 1e-6))
    return fastest


async def _echo(call: Any, loop: asyncio.AbstractEventLoop, content: bytes) -> float:
    begun = loop.time()
    with contextlib.suppress(asyncio.InvalidStateError):  # the call ended; reading says how
        await call.write(wire.MeasureRequest(echo=content))
    response = await call.read()
    if response is grpc.aio.EOF or response.echo != content:
        raise UnavailableError("the other device ended the measurement, or sent back something else")
    return loop.time() - begun
