"""The members that work on one model for this device: how fast they are, and the links to them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc

from edge_runtime.addresses import split_address
from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.exchange import Link
from edge_runtime.cluster.grpc_link import GrpcLink
from edge_runtime.cluster.node import ClusterNode
from edge_runtime.cluster.peers import Peer
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.profiling import EXCHANGE_SECONDS, ping_all
from edge_runtime.cluster.report import NodeShare
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.worker_health import WorkerHealth
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.v1 import cluster_pb2 as wire
from scheduler.deadlines import Tail, Tails
from scheduler.drift import MeasuredWorker
from scheduler.plan import Plan
from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile
from scheduler.profiles import Worker as PlannedWorker

_log = logging.getLogger("edgert.cluster")

MAX_PARTICIPANTS = 63
_SEGMENT_BYTES = 1448  # of TCP in an Ethernet frame
_PROBED_NEURONS = 1024  # of the share that a member's speed is measured with
_SHARE_SECONDS = 15e-6  # of starting to compute a share, however small; measured


@dataclass(slots=True, eq=False)
class Participant:
    """One member.

    Attributes:
        node: its number in plans, from 1.
        session: number and secret of its session; datagram_port: 0 where it takes none.
        link: as measured; None until then.
    """

    peer: Peer
    client: ControlClient
    node: int
    device: DeviceProfile
    session: int
    secret: bytes
    datagram_port: int
    stream_round_trip: LinkProfile
    link: LinkProfile | None = None
    channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the member."""
        return self.peer.member.name

    def planned(self) -> PlannedWorker:
        """For the scheduler."""
        return PlannedWorker(self.device, self.link or self.stream_round_trip)


class Participants:
    """Everybody who takes part, with sessions open. Made by `gather`; `close` ends the sessions.

    Attributes:
        link: for single tokens; bulk: streams for prompts. Both know the same node numbers.
        transport: ``udp`` or ``grpc``.
        tails, health: of the exchanges and the nodes, which outlast a plan.
        measured: the members' profiles, kept up to date.
    """

    def __init__(self, members: Sequence[Participant], transport: str, link: Link, bulk: Link) -> None:
        self.members = list(members)
        self.transport = transport
        self.link = link
        self.bulk = bulk
        self.tails = Tails([member.planned().link.round_trip_seconds for member in members])
        self.health = [WorkerHealth() for _ in range(len(members) + 1)]
        self.measured: list[MeasuredWorker] = []
        self._counted: dict[int, tuple[int, int]] = {}

    def measure(self, model: ModelProfile) -> None:
        """Keep the members' profiles up to date from now on."""
        self.measured = [MeasuredWorker(member.planned(), model) for member in self.members]

    def expect(self, shares: PlanShares) -> None:
        """Have the first answers under a plan waited for as long as they should take.

        The way there and back alone is too short where much is computed: what the coordinator can compute as
        well it would compute always, and never learn how long an answer takes.
        """
        for member in self.members:
            worker, tails = member.planned(), self.tails.workers
            most = max(shares.weights_of(layer, member.node) for layer in range(shares.shape.n_layers + 1))
            if most and not tails[member.node - 1].samples:
                computing = worker.device.overhead_seconds + most / worker.device.bytes_per_second
                tails[member.node - 1] = Tail(worker.link.round_trip_seconds + computing)

    def profiles(self) -> list[PlannedWorker]:
        """The members as they are now, for the scheduler."""
        if not self.measured:
            return [member.planned() for member in self.members]
        found = []
        for member, measured in zip(self.members, self.measured, strict=True):
            counts = self.link.statistics(member.node)
            expected, received = self._counted.get(member.node, (0, 0))
            arriving, came = counts.expected - expected, counts.received - received
            self._counted[member.node] = counts.expected, counts.received
            if arriving > 0:
                measured.sent(arriving, max(arriving - came, 0))
            description = member.peer.description
            assert description is not None
            battery = description.battery if description.battery < 100 else None
            found.append(measured.profile(description.temperature or None, battery))
        return found

    @property
    def names(self) -> frozenset[str]:
        """Of all."""
        return frozenset(member.name for member in self.members)

    async def close(self) -> None:
        """End sessions and streams; the links must not be used any more."""
        await asyncio.gather(*(self._end(member) for member in self.members))
        await asyncio.to_thread(self.bulk.close)
        if self.link is not self.bulk:
            self.link.close()

    @staticmethod
    async def _end(member: Participant) -> None:
        with contextlib.suppress(EdgeRuntimeError):
            await member.client.close_session(member.session)
        for channel in member.channels:
            channel.close()


async def gather(node: ClusterNode, peers: Sequence[Peer], model: str, shape: PartitionShape) -> Participants:
    """Open sessions with those who lend memory, and measure them and the links to them."""
    lending = [peer for peer in peers if peer.description is not None and peer.description.memory_bytes]
    found = await asyncio.gather(
        *(
            _open(node, peer, number, model, shape)
            for number, peer in enumerate(lending[:MAX_PARTICIPANTS], start=1)
        )
    )
    members = [member for member in found if member is not None]
    for number, member in enumerate(members, start=1):
        member.node = number
    transport = node.settings.transport
    bulk = GrpcLink()
    for member in members:
        channel = member.client.sync_channel()
        member.channels.append(channel)
        await asyncio.to_thread(bulk.add_worker, member.node, channel, member.session)
    if transport != "grpc" and all(member.datagram_port for member in members):
        link = UdpLink("::" if any(":" in _host(member) for member in members) else "0.0.0.0")
        for member in members:
            link.add_worker(member.node, _host(member), member.datagram_port, member.session, member.secret)
        profiles = await asyncio.to_thread(ping_all, link, [member.node for member in members])
        for member in members:
            profile = profiles[member.node]
            member.link = profile and with_bandwidth(profile, member.stream_round_trip)
        silent = [member for member in members if member.link is None]
        names = ", ".join(member.name for member in silent)
        if not silent or transport == "udp":
            for member in silent:  # with nothing to do, as the links know the others by their numbers
                member.device = replace(member.device, memory_bytes=0)
                _log.warning("no datagrams get through to %s: it takes no part", member.name)
            return Participants(members, "udp", link, bulk)
        _log.warning("no datagrams get through to %s: streams are used", names)
        link.close()
    for member in members:
        member.link = member.stream_round_trip
    return Participants(members, "grpc", bulk, bulk)


def node_shares(plan: Plan, own_speed: float, participants: Participants) -> tuple[NodeShare, ...]:
    """What each node of a plan computes, this device first."""
    found = []
    for node, (name, groups, share, slices, held, copies) in enumerate(plan.explain()):
        if node == 0:
            found.append(NodeShare(name, groups, share, slices, held, own_speed))
            continue
        member = participants.members[node - 1]
        link, counts = member.planned().link, participants.link.statistics(node)
        found.append(
            NodeShare(
                name,
                groups,
                share,
                slices,
                held,
                member.device.bytes_per_second,
                link.round_trip_seconds,
                link.jitter_seconds,
                link.loss,
                copies,
                counts.sent,
                counts.received,
                counts.repeats,
                counts.bad,
                counts.forged,
            )
        )
    return tuple(found)


async def _open(
    node: ClusterNode, peer: Peer, number: int, model: str, shape: PartitionShape
) -> Participant | None:
    """A participant; None where the member cannot be used now."""
    name, description = peer.member.name, peer.description
    assert description is not None
    session, secret = secrets.randbits(32), secrets.token_bytes(32)
    try:
        client = node.connections.client(name)
        gate, _, down = shape.types[0]
        speed = await client.measure_compute(shape.n_embd, _neurons(shape), gate, down)
        measured = await client.measure_link()
        port = await client.open_session(wire.OpenSessionRequest(model=model, session=session, secret=secret))
    except EdgeRuntimeError as error:
        _log.warning("%s takes no part: %s", name, error)
        return None
    device = DeviceProfile(
        name,
        bytes_per_second=speed,
        memory_bytes=description.memory_bytes,
        temperature=description.temperature or None,
        battery=description.battery if description.battery < 100 else None,
        overhead_seconds=_SHARE_SECONDS,
    )
    stream = LinkProfile(
        measured.round_trip_seconds,
        measured.jitter_seconds,
        measured.bytes_per_second,
        overhead_seconds=2 * EXCHANGE_SECONDS,
    )
    return Participant(peer, client, number, device, session, secret, port, stream)


def _neurons(shape: PartitionShape) -> int:
    size = shape.group_size
    return min(max(_PROBED_NEURONS // size, 1) * size, shape.n_ff)


def _host(member: Participant) -> str:
    return split_address(member.peer.member.address)[0]


def with_bandwidth(profile: LinkProfile, stream: LinkProfile) -> LinkProfile:
    """What datagrams found, with the bandwidth that a stream found.

    Where packets get lost a stream slows down and stalls, which says little about the link: it counts as at
    least as wide as such a stream is in the mean, 1.22 segments a round trip over the root of the loss
    (Mathis et al. 1997, "The macroscopic behavior of the TCP congestion avoidance algorithm").
    """
    width = stream.bytes_per_second
    if profile.loss > 0:
        width = max(width, 1.22 * _SEGMENT_BYTES / profile.round_trip_seconds / math.sqrt(profile.loss))
    return replace(profile, bytes_per_second=width)
