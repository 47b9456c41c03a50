"""What a cluster looks like from one device: its members, and the models that are spread over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

MemberState = Literal["here", "works", "idle", "paused", "expelled", "gone"]


@dataclass(frozen=True, slots=True)
class MemberReport:
    """A member of the cluster.

    Attributes:
        state: ``here`` (this device), ``works`` (computes for this device's models), ``idle``, ``paused``
            (did not answer lately), ``expelled`` (answered wrongly) or ``gone`` (cannot be reached).
        reason: why it is in that state; empty where that needs no words.
        lent_bytes: memory for weights that it lends; threads: CPU threads.
        temperature: degrees Celsius; battery: percent; each None where unknown.
        round_trip_seconds: of the control connection; None where it does not answer.
    """

    name: str
    address: str
    state: MemberState
    reason: str = ""
    version: str = ""
    machine: str = ""
    lent_bytes: int = 0
    threads: int = 0
    temperature: float | None = None
    battery: float | None = None
    round_trip_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one node computes of a model.

    Attributes:
        groups: neuron groups over all layers; share: of all groups, 0 to 1.
        nbytes: weights in its memory.
        bytes_per_second: weights that it multiplies in a second, as measured.
        round_trip_seconds, jitter_seconds, loss: of the link to it; 0 for the coordinator.
        copies: of each datagram.
        sent, received, repeats, bad, forged: datagrams (streams: messages) so far.
    """

    name: str
    groups: int
    share: float
    head_slices: int
    nbytes: int
    bytes_per_second: float = 0.0
    round_trip_seconds: float = 0.0
    jitter_seconds: float = 0.0
    loss: float = 0.0
    copies: int = 1
    sent: int = 0
    received: int = 0
    repeats: int = 0
    bad: int = 0
    forged: int = 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Where a layer's time goes, in seconds a token; `groups` on each node."""

    compute_seconds: float
    wait_seconds: float
    transfer_seconds: float
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """One model that is spread, or could be.

    Attributes:
        plan: its number; reason: why it is as it is, for a person.
        mode, quality: what the plan was made for; calibrated: whether `relaxed` is possible.
        transport: ``udp`` or ``grpc``.
        round_trips: waits in a token.
        predicted_seconds, measured_seconds: of a token; alone_seconds: predicted without the others, None
            where the model does not fit this device.
        nodes: this device first.
        syncs: boundaries at which a token waits.
        on_time, late, lost, recomputed: contributions since the start; late[k - 1] of them k layers late.
        tokens: since the plan began.
    """

    model: str
    plan: int
    reason: str
    mode: str
    quality: float
    calibrated: bool
    transport: str
    round_trips: int
    predicted_seconds: float
    measured_seconds: float
    alone_seconds: float | None
    nodes: tuple[NodeShare, ...]
    layers: tuple[LayerReport, ...]
    syncs: tuple[int, ...]
    on_time: float
    late: tuple[float, ...]
    lost: float
    recomputed: float
    tokens: int


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The whole cluster.

    Attributes:
        name: of this device; is_founder: whether it can invite others.
        fingerprint: of the cluster's authority, hexadecimal.
        address: HOST:PORT of this device, for other members.
        members: this device first.
    """

    name: str
    is_founder: bool
    fingerprint: str
    address: str
    members: tuple[MemberReport, ...]
    models: tuple[PartitionReport, ...]

    def without_addresses(self) -> ClusterReport:
        """For those who need not know where the members are; why one cannot be reached would tell it too."""
        members = (
            replace(member, address="", reason="" if member.state == "gone" else member.reason)
            for member in self.members
        )
        return replace(self, address="", members=tuple(members))
