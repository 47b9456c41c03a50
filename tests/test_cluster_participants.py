"""What is expected of members before they were measured at work."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_fixture import plan_of, spread, write_model

from edge_runtime.cluster.members import Member
from edge_runtime.cluster.participants import Participant, Participants, with_bandwidth
from edge_runtime.cluster.peers import Peer
from scheduler.profiles import DeviceProfile, LinkProfile

ROUND_TRIP = 0.001
SPEED = 1e6  # bytes of weights a second: a slow one


def test_a_slow_members_first_answers_are_waited_for_as_long_as_it_computes(tmp_path: Path) -> None:
    with spread(write_model(tmp_path)) as made:
        shares = made.use(plan_of(made.shape, (1.0, 1.0, 0.0))).plan_shares
        participants = Participants(
            [participant(1), participant(2)], "udp", made.link, made.bulk or made.link
        )
        participants.expect(shares)
        computing = max(shares.weights_of(layer, 1) for layer in range(made.shape.n_layers)) / SPEED
        assert computing > 0.1
        assert participants.tails.hard_limit(1) > computing  # nothing is computed in its place before
        assert participants.tails.workers[1].mean == ROUND_TRIP  # nothing to do


def test_what_was_measured_is_not_replaced_by_what_is_expected(tmp_path: Path) -> None:
    with spread(write_model(tmp_path)) as made:
        shares = made.use(plan_of(made.shape, (1.0, 1.0))).plan_shares
        participants = Participants([participant(1)], "udp", made.link, made.bulk or made.link)
        participants.tails.observe(1, 0.02)
        participants.expect(shares)
        assert participants.tails.workers[0].mean == pytest.approx(0.02)


def test_a_stream_that_stalls_by_loss_does_not_make_the_link_narrow() -> None:
    stalled, fine = LinkProfile(0.004, 1e-4, 32_000), LinkProfile(0.004, 1e-4, 1e7)
    found = with_bandwidth(LinkProfile(0.004, 5e-4, loss=0.1), stalled)
    assert 1e6 < found.bytes_per_second < 2e6
    assert (found.round_trip_seconds, found.jitter_seconds, found.loss) == (0.004, 5e-4, 0.1)
    assert with_bandwidth(LinkProfile(0.004, 5e-4, loss=0.1), fine).bytes_per_second == 1e7
    assert with_bandwidth(LinkProfile(0.004, 5e-4), stalled).bytes_per_second == 32_000


def participant(node: int) -> Participant:
    link = LinkProfile(ROUND_TRIP, 1e-4, 1e7)
    member = Member(f"node {node}", "127.0.0.1:1", 0.0)
    device = DeviceProfile(member.name, SPEED, 1 << 30)
    return Participant(Peer(member, None), None, node, device, node, bytes(32), 1, link, link)  # type: ignore[arg-type]
