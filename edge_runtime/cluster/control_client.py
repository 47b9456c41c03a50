"""One member's Cluster service, as another member calls it. Every call has its deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any

import grpc

from edge_runtime.cluster.control_channel import failure, open_channel, open_sync_channel
from edge_runtime.cluster.identity import Identity
from edge_runtime.cluster.link_measurement import LinkMeasurement, measure_link
from edge_runtime.errors import UnavailableError
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

CALL_SECONDS = 10.0
PROBE_SECONDS = 30.0
ADAPTERS_SECONDS = 600.0
PREPARE_SECONDS = 6 * 3600.0  # gigabytes over a slow radio link


class ControlClient:
    """Calls one member. Connects with the first call and again after breaks; use it on one event loop.

    Args:
        identity: this device's.
        address: HOST:PORT of the member.
        name: of the member that must answer; None for whichever is there.
        timeout: seconds that a short call may take.

    Every method raises the error that the member told, or:
        UnavailableError: it cannot be reached, or is not the one that was meant.
        DeadlineError: it did not answer in time.
    """

    def __init__(
        self, identity: Identity, address: str, name: str | None = None, *, timeout: float = CALL_SECONDS
    ) -> None:
        self.identity = identity
        self.address = address
        self.name = name
        self._timeout = timeout
        self._channel = open_channel(identity, address, name)
        self._stub: Any = cluster_pb2_grpc.ClusterStub(self._channel)

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call that runs over it."""
        await self._channel.close()

    def sync_channel(self) -> grpc.Channel:
        """A further channel to the same member, for threads: shards, and computing over streams. Close it."""
        return open_sync_channel(self.identity, self.address, self.name)

    async def describe(self, own_address: str | None = None) -> wire.DescribeResponse:
        """What the member is and has, and whom it knows.

        Args:
            own_address: HOST:PORT of this device's Cluster service, which the member remembers; a host of
                0.0.0.0 stands for the address that it sees.
        """
        request = wire.DescribeRequest()
        if own_address is not None:
            request.caller.CopyFrom(wire.Member(name=self.identity.name, address=own_address))
        response: wire.DescribeResponse = await self._call(self._stub.Describe, request)
        return response

    async def leave(self) -> None:
        """Leave the cluster, as far as this member is concerned; the founder's word counts."""
        await self._call(self._stub.Leave, wire.LeaveRequest())

    async def measure_link(self) -> LinkMeasurement:
        """How fast the way to the member is; takes about a second at most once it is connected."""
        await self.connect()
        with self._told():
            return await measure_link(self._stub)

    async def measure_compute(
        self, n_embd: int, neurons: int, gate_type: int, down_type: int, *, timeout: float = PROBE_SECONDS
    ) -> float:
        """Bytes of weights that the member multiplies in a second, for a share of this shape.

        Args:
            neurons: hidden ones.
            gate_type, down_type: ggml types of gate and up, and of down.
        """
        probe = wire.ComputeProbe(n_embd=n_embd, neurons=neurons, gate_type=gate_type, down_type=down_type)
        with self._told():
            call = self._stub.Measure(timeout=timeout, wait_for_ready=False)
            try:
                await call.write(wire.MeasureRequest(compute=probe))
                await call.done_writing()
                response = await call.read()
            finally:
                call.cancel()
        if response is grpc.aio.EOF or response.WhichOneof("kind") != "bytes_per_second":
            raise UnavailableError(f"{self.address} did not say how fast it computes")
        return float(response.bytes_per_second)

    async def prepare(
        self, request: wire.PrepareRequest, *, timeout: float = PREPARE_SECONDS
    ) -> AsyncIterator[wire.PrepareProgress]:
        """Let the member fetch and load neuron groups; the last message is ``ready``."""
        call = self._stub.Prepare(request, timeout=timeout)
        try:
            with self._told():
                async for progress in call:
                    yield progress
        finally:
            call.cancel()

    async def prepare_adapters(
        self, requests: Iterable[wire.PrepareAdaptersRequest], *, timeout: float = ADAPTERS_SECONDS
    ) -> int:
        """Give the member the side paths of a version of the adapters; the memory that they take there."""

        async def each() -> AsyncIterator[wire.PrepareAdaptersRequest]:
            for request in requests:
                yield request

        with self._told():
            response = await self._stub.PrepareAdapters(each(), timeout=timeout)
        return int(response.loaded_bytes)

    async def open_session(self, request: wire.OpenSessionRequest) -> int:
        """Agree on a key; the member's UDP port for datagrams, 0 where it takes none."""
        response = await self._call(self._stub.OpenSession, request)
        return int(response.datagram_port)

    async def close_session(self, session: int) -> None:
        """End a session."""
        await self._call(self._stub.CloseSession, wire.CloseSessionRequest(session=session))

    async def connect(self) -> None:
        """Wait until the connection stands.

        Raises:
            UnavailableError: it does not, within the time of a short call.
        """
        await self.describe()

    async def _call(self, method: Any, request: Any) -> Any:
        with self._told():
            return await method(request, timeout=self._timeout)

    @contextlib.contextmanager
    def _told(self) -> Any:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise failure(error, self.address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Of the call alone: its channel was closed.
            raise UnavailableError(f"the connection to {self.address} was closed") from None
