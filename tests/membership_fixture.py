"""Devices of a cluster inside the test's process: real files, real certificates, real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc

from edge_runtime.cluster.authority import found_cluster, open_authority
from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.control_gate import Caller
from edge_runtime.cluster.control_server import ControlServer, DeviceDescription, WorkedModel
from edge_runtime.cluster.identity import Identity, database_of, read_identity
from edge_runtime.cluster.invitation import VALID_SECONDS, make_invitation
from edge_runtime.cluster.joining import join
from edge_runtime.cluster.members import Members
from edge_runtime.cluster.peers import Peers
from edge_runtime.errors import ModelNotFoundError
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

Scenario = Callable[[Path], Coroutine[Any, Any, None]]
MODEL = hashlib.sha256(b"a model").hexdigest()


class EchoWorker:
    """Answers what it was asked, so that a test sees what passed the border.

    Attributes:
        callers: of each call, in order.
        ended: how many streams of computing ended, however they did.
    """

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.ended = 0

    async def prepare(
        self, caller: Caller, request: wire.PrepareRequest
    ) -> AsyncIterator[wire.PrepareProgress]:
        self.callers.append(caller)
        groups = sum(len(layer.groups) for layer in request.layers)
        yield wire.PrepareProgress(total_bytes=groups)
        yield wire.PrepareProgress(total_bytes=groups, fetched_bytes=groups, ready=True)

    async def prepare_adapters(
        self, caller: Caller, requests: AsyncIterator[wire.PrepareAdaptersRequest]
    ) -> wire.PrepareAdaptersResponse:
        size = sum([len(part.content) async for request in requests for part in request.parts])
        self.callers.append(caller)
        return wire.PrepareAdaptersResponse(loaded_bytes=size)

    async def fetch_shard(
        self, caller: Caller, request: wire.FetchShardRequest
    ) -> AsyncIterator[wire.ShardChunk]:
        self.callers.append(caller)
        if request.digest == bytes(32):
            raise ModelNotFoundError("no shard of that digest is here")
        yield wire.ShardChunk(content=request.digest, total_bytes=32)

    async def open_session(
        self, caller: Caller, request: wire.OpenSessionRequest
    ) -> wire.OpenSessionResponse:
        self.callers.append(caller)
        return wire.OpenSessionResponse(datagram_port=4711)

    async def close_session(
        self, caller: Caller, request: wire.CloseSessionRequest
    ) -> wire.CloseSessionResponse:
        self.callers.append(caller)
        raise RuntimeError("a secret that stays here")

    async def compute(
        self, caller: Caller, requests: AsyncIterator[wire.ComputeRequest]
    ) -> AsyncIterator[wire.ComputeResponse]:
        self.callers.append(caller)
        try:
            async for request in requests:
                yield wire.ComputeResponse(step=request.step, layer=request.layer, sums=request.inputs)
        finally:
            self.ended += 1


class Device:
    """One device with a home folder; as a context manager its Cluster service runs.

    Attributes:
        port: where it listens.
        probes: what it was asked to measure.
        changes: how often somebody joined or left.
    """

    def __init__(self, home: Path, *, stall_seconds: float = 60.0) -> None:
        self.home = home
        self.port = 0
        self.worker = EchoWorker()
        self.probes: list[wire.ComputeProbe] = []
        self.changes = 0
        self._stall_seconds = stall_seconds

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def members(self) -> Members:
        return Members(database_of(self.home))

    @property
    def identity(self) -> Identity:
        found = read_identity(self.home)
        assert found is not None
        return found

    async def __aenter__(self) -> Device:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        identity = self.identity
        self.peers = Peers(identity, self.members, f"0.0.0.0:{self.port or 1}")
        self.server = ControlServer(
            identity,
            self.members,
            self.worker,
            address=self.address,
            describe=self._describe,
            measure_compute=self._measure,
            authority=open_authority(self.home) if identity.is_founder else None,
            ask_founder=None if identity.is_founder else self.peers.ask_founder,
            changed=self._count_change,
            stall_seconds=self._stall_seconds,
        )
        self.port = await self.server.start()
        self.peers = Peers(identity, self.members, f"0.0.0.0:{self.port}")
        if identity.is_founder:
            found_cluster(self.home, identity.name, self.address)

    async def stop(self) -> None:
        await self.peers.close()
        await self.server.stop(0.2)

    def invite(self, *, valid_seconds: float = VALID_SECONDS, addresses: Sequence[str] = ()) -> str:
        addresses = addresses or [self.address]
        return make_invitation(self.home, addresses, valid_seconds=valid_seconds).text()

    def client(self, other: Device, name: str | None = None) -> ControlClient:
        return ControlClient(self.identity, other.address, name, timeout=5.0)

    def _describe(self) -> DeviceDescription:
        held = WorkedModel(MODEL, groups=3, head_slices=1, nbytes=99)
        return DeviceDescription(memory_bytes=1 << 30, threads=2, temperature=48.5, models=[held])

    async def _measure(self, probe: wire.ComputeProbe) -> float:
        self.probes.append(probe)
        await asyncio.sleep(0)
        return 3e9

    def _count_change(self) -> None:
        self.changes += 1


def founder(home: Path, name: str = "first") -> Device:
    """A device that founded a cluster."""
    found_cluster(home, name, "127.0.0.1:1")
    return Device(home)


async def joined(host: Device, home: Path, name: str) -> Device:
    """A device that joined the cluster of another one, not yet serving."""
    await join(home, host.invite(), name, "0.0.0.0:1")
    return Device(home)


def played(scenario: Scenario) -> Callable[[Path], None]:
    """A test that runs on an event loop of its own, and never for long."""

    def test(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(scenario(tmp_path), 30))

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what other tasks bring about."""
    while not reached():
        await asyncio.sleep(0.01)


def stub_of(channel: grpc.aio.Channel) -> Any:
    """The Cluster service at the other end."""
    return cluster_pb2_grpc.ClusterStub(channel)
