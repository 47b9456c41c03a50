"""A cluster's report as messages of the gRPC API."""

from __future__ import annotations

from edge_runtime.cluster.report import ClusterReport, LayerReport, MemberReport, NodeShare, PartitionReport
from edge_runtime.v1 import daemon_pb2 as pb
from edge_runtime.v1 import inference_pb2

_STATES = {
    "here": pb.MEMBER_STATE_HERE,
    "works": pb.MEMBER_STATE_WORKS,
    "idle": pb.MEMBER_STATE_IDLE,
    "paused": pb.MEMBER_STATE_PAUSED,
    "expelled": pb.MEMBER_STATE_EXPELLED,
    "gone": pb.MEMBER_STATE_GONE,
}
_MODES = {"exact": inference_pb2.MODE_EXACT, "relaxed": inference_pb2.MODE_RELAXED}


def cluster_status(report: ClusterReport) -> pb.ClusterStatus:
    """The whole of it."""
    return pb.ClusterStatus(
        name=report.name,
        is_founder=report.is_founder,
        fingerprint=report.fingerprint,
        address=report.address,
        members=[_member(member) for member in report.members],
        models=[_model(model) for model in report.models],
    )


def _member(member: MemberReport) -> pb.ClusterMember:
    return pb.ClusterMember(
        name=member.name,
        address=member.address,
        state=_STATES[member.state],
        reason=member.reason,
        version=member.version,
        machine=member.machine,
        lent_bytes=member.lent_bytes,
        threads=member.threads,
        temperature=member.temperature,
        battery=member.battery,
        round_trip_seconds=member.round_trip_seconds,
    )


def _model(model: PartitionReport) -> pb.PartitionedModel:
    return pb.PartitionedModel(
        model=model.model,
        plan=model.plan,
        reason=model.reason,
        mode=_MODES[model.mode],
        quality=model.quality,
        calibrated=model.calibrated,
        transport=model.transport,
        round_trips=model.round_trips,
        predicted_seconds=model.predicted_seconds,
        measured_seconds=model.measured_seconds,
        alone_seconds=model.alone_seconds,
        nodes=[_share(node) for node in model.nodes],
        layers=[_layer(layer) for layer in model.layers],
        syncs=model.syncs,
        on_time=model.on_time,
        late=model.late,
        lost=model.lost,
        recomputed=model.recomputed,
        tokens=model.tokens,
    )


def _share(node: NodeShare) -> pb.NodeShare:
    return pb.NodeShare(
        name=node.name,
        groups=node.groups,
        share=node.share,
        head_slices=node.head_slices,
        weight_bytes=node.nbytes,
        bytes_per_second=node.bytes_per_second,
        round_trip_seconds=node.round_trip_seconds,
        jitter_seconds=node.jitter_seconds,
        loss=node.loss,
        copies=node.copies,
        sent=node.sent,
        received=node.received,
        repeats=node.repeats,
        bad=node.bad,
        forged=node.forged,
    )


def _layer(layer: LayerReport) -> pb.LayerTimes:
    return pb.LayerTimes(
        compute_seconds=layer.compute_seconds,
        wait_seconds=layer.wait_seconds,
        transfer_seconds=layer.transfer_seconds,
        groups=layer.groups,
    )
