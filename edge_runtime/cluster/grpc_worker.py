"""The worker's end of the data plane over a stream: prompts, and networks that block datagrams.

A response without sums is no contribution: with `n_rows` 0 it answers a ping (a request of one row whose
inputs are the single byte 0, and whose `step` comes back), else `n_rows` is the `RefusalReason`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter

from edge_runtime.cluster.exchange import PLAN_MASK, RefusalReason, RefusedError
from edge_runtime.cluster.udp_worker import UdpWorker, check_sums
from edge_runtime.errors import OverloadedError, RequestError
from edge_runtime.v1 import cluster_pb2 as wire

PING_INPUTS = b"\0"
MAX_MESSAGE_BYTES = 16 << 20
MOST_SUM_BYTES = MAX_MESSAGE_BYTES - 1024  # beside the message's other fields
_MOST_READ_AHEAD = 4  # requests; each may have the length of a message
_MOST_SESSIONS = 64  # of one stream
_MOST_MICROSECONDS = (1 << 32) - 1


async def serve_compute(
    worker: UdpWorker, requests: AsyncIterator[wire.ComputeRequest]
) -> AsyncIterator[wire.ComputeResponse]:
    """Answer a stream's requests in turn, computing in the worker's thread.

    Args:
        requests: checked, of sessions that are the caller's; an error in there ends the stream.

    Requests of a step that is over by the time they are due get no answer.

    Raises:
        RequestError: too many sessions on one stream.
    """
    ahead: asyncio.Queue[wire.ComputeRequest | None] = asyncio.Queue()
    room = asyncio.Semaphore(_MOST_READ_AHEAD)  # not of the queue itself: its end must always find room
    newest: dict[int, int] = {}
    reader = asyncio.create_task(_read_ahead(requests, ahead, room, newest))
    try:
        while (request := await ahead.get()) is not None:
            room.release()
            if request.inputs == PING_INPUTS:
                yield wire.ComputeResponse(step=request.step, layer=request.layer)
            elif request.step >= newest[request.session]:
                yield await _response(worker, request)
        await reader  # raises what ended the reading
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read_ahead(
    requests: AsyncIterator[wire.ComputeRequest],
    ahead: asyncio.Queue[wire.ComputeRequest | None],
    room: asyncio.Semaphore,
    newest: dict[int, int],
) -> None:
    try:
        async for request in requests:
            if request.inputs != PING_INPUTS:
                if request.session not in newest and len(newest) >= _MOST_SESSIONS:
                    raise RequestError(f"{_MOST_SESSIONS} sessions use this stream; open another")
                newest[request.session] = max(request.step, newest.get(request.session, 0))
            await room.acquire()
            ahead.put_nowait(request)
    finally:
        ahead.put_nowait(None)


async def _response(worker: UdpWorker, request: wire.ComputeRequest) -> wire.ComputeResponse:
    def compute() -> tuple[bytes, int]:
        started = perf_counter()
        sums = worker.compute(
            request.session, request.plan & PLAN_MASK, request.layer, request.n_rows, request.inputs
        )
        took = round((perf_counter() - started) * 1e6)
        check_sums(sums, request.n_rows)
        if sums.nbytes > MOST_SUM_BYTES:
            raise RefusedError(RefusalReason.INVALID)
        # Copied in this thread: the next computation may use the same memory.
        return sums.astype("<f4", copy=False).tobytes(), min(took, _MOST_MICROSECONDS)

    try:
        sums, took = await asyncio.wrap_future(worker.post(compute))
    except RefusedError as refusal:
        reason = refusal.reason
    except OverloadedError:
        reason = RefusalReason.BUSY
    except Exception:
        worker.log_failure(request.session, request.layer)
        reason = RefusalReason.FAILED
    else:
        return wire.ComputeResponse(
            step=request.step,
            layer=request.layer,
            n_rows=request.n_rows,
            sums=sums,
            compute_microseconds=took,
        )
    return wire.ComputeResponse(step=request.step, layer=request.layer, n_rows=int(reason))
