"""A cluster's report as numbers for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric

from edge_runtime.cluster.report import ClusterReport, MemberState, PartitionReport


def cluster_gauges(report: ClusterReport) -> Iterator[Metric]:
    """Gauges throughout: what is counted begins anew with each plan and each link."""
    members = GaugeMetricFamily(
        "edgert_cluster_members", "Members of the cluster, by state.", labels=["state"]
    )
    states = Counter(member.state for member in report.members)
    for state in get_args(MemberState):
        members.add_metric([state], states[state])
    yield members
    yield from _times(report)
    yield from _contributions(report)
    yield from _links(report)


def _times(report: ClusterReport) -> Iterator[Metric]:
    predicted = _of_models(
        "edgert_cluster_token_predicted_seconds", "Time of a token that the plan in force expects."
    )
    measured = _of_models("edgert_cluster_token_measured_seconds", "Running mean of the time of a token.")
    trips = _of_models("edgert_cluster_token_round_trips", "How often a token waits for other devices.")
    for model in report.models:
        predicted.add_metric([model.model], model.predicted_seconds)
        if model.tokens:
            measured.add_metric([model.model], model.measured_seconds)
        trips.add_metric([model.model], model.round_trips)
    yield from (predicted, measured, trips)


def _contributions(report: ClusterReport) -> Iterator[Metric]:
    found = GaugeMetricFamily(
        "edgert_cluster_contributions",
        "Other devices' contributions under the plan in force, by what became of them.",
        labels=["model", "outcome"],
    )
    for model in report.models:
        for outcome, count in _outcomes(model).items():
            found.add_metric([model.model, outcome], count)
    yield found


def _outcomes(model: PartitionReport) -> dict[str, float]:
    return {
        "on_time": model.on_time,
        "late": sum(model.late),
        "lost": model.lost,
        "recomputed": model.recomputed,
    }


def _links(report: ClusterReport) -> Iterator[Metric]:
    share = GaugeMetricFamily(
        "edgert_cluster_share", "Part of a model's neuron groups on a device.", labels=["model", "member"]
    )
    resends = GaugeMetricFamily(
        "edgert_cluster_resends",
        "Requests sent again because no answer came, since the links were opened.",
        labels=["model", "member"],
    )
    for model in report.models:
        for number, node in enumerate(model.nodes):
            share.add_metric([model.model, node.name], node.share)
            if number:
                resends.add_metric([model.model, node.name], node.repeats)
    yield from (share, resends)


def _of_models(name: str, explanation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, explanation, labels=["model"])
