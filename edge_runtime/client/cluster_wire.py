"""A cluster's messages to values, for both clients."""

from __future__ import annotations

from edge_runtime.cluster.report import (
    ClusterReport,
    LayerReport,
    MemberReport,
    MemberState,
    NodeShare,
    PartitionReport,
)
from edge_runtime.v1 import daemon_pb2, inference_pb2

_STATES: dict[int, MemberState] = {
    daemon_pb2.MEMBER_STATE_HERE: "here",
    daemon_pb2.MEMBER_STATE_WORKS: "works",
    daemon_pb2.MEMBER_STATE_IDLE: "idle",
    daemon_pb2.MEMBER_STATE_PAUSED: "paused",
    daemon_pb2.MEMBER_STATE_EXPELLED: "expelled",
    daemon_pb2.MEMBER_STATE_GONE: "gone",
}


def cluster_report(message: daemon_pb2.ClusterStatus) -> ClusterReport:
    """The whole of it."""
    return ClusterReport(
        name=message.name,
        is_founder=message.is_founder,
        fingerprint=message.fingerprint,
        address=message.address,
        members=tuple(_member(one) for one in message.members),
        models=tuple(_model(one) for one in message.models),
    )


def _member(message: daemon_pb2.ClusterMember) -> MemberReport:
    return MemberReport(
        name=message.name,
        address=message.address,
        state=_STATES.get(message.state, "idle"),
        reason=message.reason,
        version=message.version,
        machine=message.machine,
        lent_bytes=message.lent_bytes,
        threads=message.threads,
        temperature=message.temperature if message.HasField("temperature") else None,
        battery=message.battery if message.HasField("battery") else None,
        round_trip_seconds=message.round_trip_seconds if message.HasField("round_trip_seconds") else None,
    )


def _model(message: daemon_pb2.PartitionedModel) -> PartitionReport:
    return PartitionReport(
        model=message.model,
        plan=message.plan,
        reason=message.reason,
        mode="relaxed" if message.mode == inference_pb2.MODE_RELAXED else "exact",
        quality=message.quality,
        calibrated=message.calibrated,
        transport=message.transport,
        round_trips=message.round_trips,
        predicted_seconds=message.predicted_seconds,
        measured_seconds=message.measured_seconds,
        alone_seconds=message.alone_seconds if message.HasField("alone_seconds") else None,
        nodes=tuple(_share(one) for one in message.nodes),
        layers=tuple(_layer(one) for one in message.layers),
        syncs=tuple(message.syncs),
        on_time=message.on_time,
        late=tuple(message.late),
        lost=message.lost,
        recomputed=message.recomputed,
        tokens=message.tokens,
    )


def _share(message: daemon_pb2.NodeShare) -> NodeShare:
    return NodeShare(
        name=message.name,
        groups=message.groups,
        share=message.share,
        head_slices=message.head_slices,
        nbytes=message.weight_bytes,
        bytes_per_second=message.bytes_per_second,
        round_trip_seconds=message.round_trip_seconds,
        jitter_seconds=message.jitter_seconds,
        loss=message.loss,
        copies=message.copies,
        sent=message.sent,
        received=message.received,
        repeats=message.repeats,
        bad=message.bad,
        forged=message.forged,
    )


def _layer(message: daemon_pb2.LayerTimes) -> LayerReport:
    return LayerReport(
        compute_seconds=message.compute_seconds,
        wait_seconds=message.wait_seconds,
        transfer_seconds=message.transfer_seconds,
        groups=tuple(message.groups),
    )
