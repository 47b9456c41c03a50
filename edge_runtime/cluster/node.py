"""This device in its cluster: the service for other members, and what it knows of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import __version__
from edge_runtime.addresses import join_address, split_address
from edge_runtime.cluster.authority import open_authority
from edge_runtime.cluster.control_gate import current_caller
from edge_runtime.cluster.control_server import ControlServer, DeviceDescription
from edge_runtime.cluster.identity import Identity, database_of, read_identity
from edge_runtime.cluster.members import Members
from edge_runtime.cluster.peers import REFRESH_SECONDS, Peer, Peers
from edge_runtime.cluster.report import ClusterReport, MemberReport, MemberState
from edge_runtime.cluster.settings import ClusterSettings
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_source import ShardSource
from edge_runtime.cluster.worker import Worker
from edge_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edge_runtime.cluster.partitioned_model import PartitionedModel

_log = logging.getLogger("edgert.cluster")

_EXPECTED_LOOKS = 5
_EXPECTED_SECONDS = 1.0  # between them: a connection that was just refused is not tried again at once


class ClusterNode:
    """Make and use it on the daemon's event loop; `start` before anything else, `stop` at the end.

    Args:
        identity: this device's.
        home: folder of the daemon's state.
        cache_folder: for fetched shards; None for the usual one.
        strain: temperature in degrees Celsius and battery in percent, each None where unknown.
    """

    def __init__(
        self,
        identity: Identity,
        home: Path,
        settings: ClusterSettings,
        *,
        cache_folder: Path | None = None,
        strain: Callable[[], tuple[float | None, float | None]] = lambda: (None, None),
    ) -> None:
        self.identity = identity
        self.settings = settings
        self.members = Members(database_of(home))
        self.peers: list[Peer] = []
        self._home = home
        self._strain = strain
        host, port = split_address(settings.listen)
        self._cache = ShardCache(cache_folder)
        self.source = ShardSource(self._cache)
        self.connections = Peers(identity, self.members, settings.address or join_address("0.0.0.0", port))
        self._worker = Worker(
            identity,
            self.members,
            self._cache,
            self.source,
            memory_bytes=settings.lend_bytes,
            threads=settings.threads,
            host=host,
            port=port,
        )
        self._server = ControlServer(
            identity,
            self.members,
            self._worker,
            address=settings.listen,
            describe=self._describe,
            measure_compute=self._worker.measure_compute,
            authority=open_authority(home) if identity.is_founder else None,
            ask_founder=self.connections.ask_founder,
            changed=self.look_again,
            heard=self._heard,
        )
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self._expected: dict[str, int] = {}  # members that called and did not answer yet -> further looks
        self._task: asyncio.Task[None] | None = None
        self._discovery: object = None

    @classmethod
    def open(cls, home: Path, settings: ClusterSettings, **more: object) -> ClusterNode | None:
        """This device's node; None where it belongs to no cluster.

        Raises:
            ConfigError: the cluster's files are damaged.
        """
        identity = read_identity(home)
        return None if identity is None else cls(identity, home, settings, **more)  # type: ignore[arg-type]

    @property
    def port(self) -> int:
        """Of the Cluster service."""
        return self._server.port

    async def start(self) -> None:
        """Listen, and begin to look for the others.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        await self._server.start()
        self.connections.hint(self.settings.peers)
        if self.settings.discovery:
            await self._discover()
        self._task = asyncio.create_task(self._keep_looking(), name="cluster peers")
        _log.info("in the cluster as %s", self.identity.name, extra={"port": self.port})

    async def _discover(self) -> None:
        from edge_runtime.cluster.discovery import Discovery

        def found(address: str) -> None:
            self.connections.hint([address])
            self.look_again()

        self._discovery = discovery = Discovery(self.identity, self.port, found)
        try:
            await discovery.start()
        except OSError as error:
            _log.warning("no mDNS here, members are found by their addresses only: %s", error)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have somebody told after each look at the others."""
        self._listeners.append(listener)

    def look_again(self) -> None:
        """Look at the others soon."""
        self._changed.set()

    def _heard(self, name: str) -> None:
        """A member called. One that did not answer at the last look will do so soon: it has just started."""
        if name not in self._answering() and name not in self._expected:
            self._expected[name] = _EXPECTED_LOOKS
            self.look_again()

    def _answering(self) -> set[str]:
        return {peer.member.name for peer in self.peers if peer.description is not None}

    def _is_expecting(self) -> bool:
        """Whether a member called that does not answer yet; each is looked for a few times."""
        here = self._answering()
        self._expected = {
            name: looks - 1 for name, looks in self._expected.items() if looks > 1 and name not in here
        }
        return bool(self._expected)

    async def refresh(self) -> list[Peer]:
        """Look at the others now."""
        self.peers = await self.connections.refresh()
        return self.peers

    async def _keep_looking(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self.refresh()
            except EdgeRuntimeError as error:
                _log.warning("the cluster's members cannot be asked: %s", error)
            else:
                for listener in self._listeners:
                    listener()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXPECTED_SECONDS if self._is_expecting() else REFRESH_SECONDS):
                    await self._changed.wait()

    def _describe(self) -> DeviceDescription:
        caller = current_caller().name
        if not any(peer.member.name == caller and peer.description is not None for peer in self.peers):
            self.look_again()  # it was not there at the last look, and now it is
        temperature, battery = self._strain()
        return DeviceDescription(
            memory_bytes=self._worker.memory_bytes,
            threads=self._worker.threads,
            temperature=temperature,
            battery=battery,
            models=self._worker.models(),
        )

    def report(self, models: Sequence[PartitionedModel]) -> ClusterReport:
        """The cluster as it was at the last look, and the models that are spread over it."""
        temperature, battery = self._strain()
        host, port = split_address(self.settings.listen)
        here = MemberReport(
            self.identity.name,
            self.settings.address or join_address(host, self.port or port),
            "here",
            version=__version__,
            machine=platform.machine(),
            lent_bytes=self._worker.memory_bytes,
            threads=self._worker.threads,
            temperature=temperature,
            battery=battery,
        )
        return ClusterReport(
            name=self.identity.name,
            is_founder=self.identity.is_founder,
            fingerprint=self.identity.fingerprint,
            address=here.address,
            members=(here, *(member_report(peer, models) for peer in self.peers)),
            models=tuple(model.report() for model in models),
        )

    async def stop(self) -> None:
        """End everything; safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._discovery is not None:
            await self._discovery.stop()  # type: ignore[attr-defined]
            self._discovery = None
        await self._server.stop()
        await self.connections.close()
        await self._worker.close()
        self._cache.close()


def member_report(peer: Peer, models: Sequence[PartitionedModel]) -> MemberReport:
    """Another member as it last answered, and how it does its part in this device's models."""
    description = peer.description
    if description is None:
        return MemberReport(peer.member.name, peer.member.address, "gone", peer.error)
    state: MemberState = "idle"
    reason = ""
    for model in models:
        health = model.health_of(peer.member.name)
        if health is None:
            continue
        if health.expelled:
            state, reason = "expelled", health.expelled
        elif health.is_paused:
            state, reason = "paused", "it did not answer in time"
        elif state == "idle":
            state = "works"
    return MemberReport(
        peer.member.name,
        peer.member.address,
        state,
        reason,
        version=description.version,
        machine=description.machine,
        lent_bytes=description.memory_bytes,
        threads=description.threads,
        temperature=description.temperature or None,
        battery=description.battery if description.battery < 100 else None,
        round_trip_seconds=peer.round_trip_seconds,
    )
