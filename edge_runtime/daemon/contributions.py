"""From a cluster's accounts to what an answer tells."""

from __future__ import annotations

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.daemon.requests import ContributionCounts


def counts_of(forwarding: object) -> ContributionCounts | None:
    """What became of other devices' contributions to an answer; None where there were none."""
    if not isinstance(forwarding, Contributions):
        return None
    counts = ContributionCounts(
        on_time=forwarding.on_time,
        late=tuple(forwarding.late),
        lost=forwarding.lost,
        recomputed=forwarding.recomputed,
        fell_back=forwarding.fell_back,
    )
    return counts if counts.on_time or any(counts.late) or counts.lost or counts.recomputed else None
