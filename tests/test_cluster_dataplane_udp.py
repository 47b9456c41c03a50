"""Requests and answers over real sockets: what arrives, what is lost, what comes twice, and who is let in."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from dataplane_fixture import (
    HOST,
    SESSION,
    WIDTH,
    Computing,
    Relay,
    collect,
    connected,
    join,
    nothing_comes,
    sums_of,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cluster.datagram import Kind
from edge_runtime.cluster.sealing import Cipher
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.errors import RequestError

INPUTS = random.Random(1).randbytes(2176)


@contextmanager
def relayed(computing: Computing, **lost: set[int]) -> Iterator[tuple[UdpLink, UdpWorker, Relay]]:
    """A link and its worker; numbers of datagrams that are lost on the way `there` and `back`."""
    worker = UdpWorker(HOST, 0, computing)
    relay = Relay(worker.port, lambda there, number: number not in lost.get("there" if there else "back", ()))
    link = UdpLink(HOST)
    try:
        join(link, worker, relay.port)
        link.begin_step(1)
        yield link, worker, relay
    finally:
        relay.close()
        link.close()
        worker.stop()


# --- what arrives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 1400, 1472, 9000])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_an_exact_answer_arrives_bit_by_bit(size: int, n_rows: int) -> None:
    with connected(Computing(), datagram_bytes=size) as (link, _):
        link.send(1, 1, 5, n_rows, INPUTS * n_rows, plan=70_001, n_values=n_rows * WIDTH)
        (found,) = collect(link, n_rows * WIDTH).values()
    assert (found == sums_of(70_001 & 0xFFFF, 5, n_rows, INPUTS * n_rows).reshape(-1)).all()


def test_a_relaxed_answer_is_smaller_and_nearly_the_same() -> None:
    with connected(Computing()) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1, exact=False)
        (found,) = collect(link).values()
        relaxed_bytes = link.statistics(1).received_bytes
        link.send(1, 1, 6, 1, INPUTS, plan=1)
        collect(link)
        exact_bytes = link.statistics(1).received_bytes - relaxed_bytes
    right = sums_of(1, 5, 1, INPUTS)[0]
    assert np.abs(found - right).max() <= np.abs(right).max() / 127
    assert relaxed_bytes < 0.3 * exact_bytes


@pytest.mark.parametrize("form", [ActivationForm.F16, ActivationForm.F32], ids=lambda form: form.name)
def test_the_form_of_relaxed_answers_can_be_chosen(form: ActivationForm) -> None:
    worker = UdpWorker(HOST, 0, Computing())
    link = UdpLink(HOST, relaxed_form=form)
    try:
        join(link, worker, worker.port)
        link.begin_step(1)
        link.send(1, 1, 5, 1, INPUTS, plan=1, exact=False)
        (found,) = collect(link).values()
        assert np.allclose(found, sums_of(1, 5, 1, INPUTS)[0], rtol=2**-10, atol=2**-14)
    finally:
        link.close()
        worker.stop()
    with pytest.raises(RequestError, match="Q8_K"):
        UdpLink(HOST, relaxed_form=ActivationForm.Q8_K)


def test_all_layers_of_several_workers_can_be_under_way_at_once() -> None:
    workers = [UdpWorker(HOST, 0, Computing()) for _ in range(3)]
    link = UdpLink(HOST, cipher=Cipher.CHACHA20_POLY1305)
    try:
        for number, worker in enumerate(workers, start=1):
            join(link, worker, worker.port, number, session=100 + number)
        for step in (1, 2):
            link.begin_step(step)
            for layer in range(8):
                for number in (1, 2, 3):
                    link.send(number, step, layer, 1, INPUTS, plan=number)
            found = collect(link, layers=24)
            for (number, layer), values in found.items():
                assert (values == sums_of(number, layer, 1, INPUTS)[0]).all()
    finally:
        link.close()
        for worker in workers:
            worker.stop()


def test_more_datagrams_than_one_call_of_the_system_takes_all_arrive() -> None:
    with connected(Computing(width=40_000)) as (link, _):
        link.send(1, 1, 0, 1, INPUTS * 60, plan=1)
        (found,) = collect(link, 40_000).values()
    assert (found == sums_of(1, 0, 1, INPUTS * 60, 40_000)[0]).all()


def test_datagrams_go_one_by_one_where_the_system_takes_no_bursts() -> None:
    with connected(Computing()) as (link, worker):
        link._socket._bursts = worker._socket._bursts = False
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        (found,) = collect(link).values()
    assert (found == sums_of(1, 0, 1, INPUTS)[0]).all()


def test_the_answer_says_how_long_computing_took() -> None:
    with connected(Computing()) as (link, _):
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        answer = link.receive(5)
    assert answer is not None
    assert 0 < answer.compute_seconds < 5
    assert (answer.n_values, answer.step, answer.worker) == (WIDTH, 1, 1)


def test_a_ping_measures_the_round_trip_and_is_a_sign_of_life() -> None:
    with connected(Computing()) as (link, _):
        assert np.isnan(link.round_trips(1)) and link.last_seen(1) == -np.inf
        link.ping(1)
        until(lambda: link.receive(0.01) is None and link.last_seen(1) > 0)
        assert 0 < link.round_trips(1) < 5


def test_an_answer_comes_over_ipv6_and_to_ipv4_from_a_socket_for_both() -> None:
    try:
        worker = UdpWorker("::", 0, Computing())
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
    link = UdpLink("::")
    try:
        for number, host in enumerate((HOST, "::1"), start=1):
            secret = os.urandom(32)
            worker.add_session(number, secret, "coordinator")
            link.add_worker(number, host, worker.port, number, secret)
        link.begin_step(1)
        for number in (1, 2):
            link.send(number, 1, 0, 1, INPUTS, plan=1)
        assert set(collect(link, layers=2)) == {(1, 0), (2, 0)}
    finally:
        link.close()
        worker.stop()


# --- what is lost and what comes twice ------------------------------------------------------------


def test_a_repeat_brings_what_is_missing_and_computes_nothing_again() -> None:
    computing = Computing()
    with relayed(computing, back={1, 4}) as (link, worker, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        first = [link.receive(5) for _ in range(5)]
        fragments = {answer.fragment for answer in first if answer is not None}
        assert fragments == {0, 2, 3, 5, 6}
        assert nothing_comes(link)
        link.repeat(1, 1, 5, 0b0010010)
        again = [link.receive(5), link.receive(5)]
        assert {answer.fragment for answer in again if answer is not None} == {1, 4}
        assert nothing_comes(link)
        assert computing.layers == [5]
        assert worker.statistics(SESSION).repeats == link.statistics(1).repeats == 1
        assert link.statistics(1).duplicates == 0


def test_a_repeat_brings_the_inputs_that_never_arrived() -> None:
    computing = Computing()
    with relayed(computing, there={0}) as (link, _, _relay):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert nothing_comes(link)
        link.repeat(1, 1, 5, -1)
        (found,) = collect(link).values()
    assert (found == sums_of(1, 5, 1, INPUTS)[0]).all()
    assert computing.layers == [5]


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 60)))
def test_any_losses_are_made_up_by_repeats(there: set[int], back: set[int]) -> None:
    computing = Computing()
    with relayed(computing, there=there, back=back) as (link, _, _relay):
        target = np.full(WIDTH, np.nan, np.float32)
        link.send(1, 1, 2, 1, INPUTS, plan=1)
        missing = -1
        for _ in range(200):
            answer = link.receive(0.005)
            if answer is None:
                link.repeat(1, 1, 2, missing)
                continue
            target[answer.first : answer.first + len(answer.values)] = answer.values
            missing = missing if missing > 0 else (1 << answer.n_fragments) - 1
            missing &= ~(1 << answer.fragment)
            if not missing:
                break
    assert (target == sums_of(1, 2, 1, INPUTS)[0]).all()
    assert computing.layers == [2]


def test_copies_make_up_for_losses_without_a_repeat() -> None:
    computing = Computing()
    # The second of two request datagrams, and half of the answer's, at the first time.
    with relayed(computing, there={1}, back={0, 2, 4}) as (link, worker, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1, copies=2)
        (found,) = collect(link).values()
        until(lambda: nothing_comes(link, 0.02) and link.statistics(1).duplicates == 4)
        assert worker.statistics(SESSION).duplicates == 1
        assert link.statistics(1).repeats == 0
    assert (found == sums_of(1, 5, 1, INPUTS)[0]).all()
    assert computing.layers == [5]


def test_a_request_sent_twice_without_being_a_repeat_is_answered_once() -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        collect(link)
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        until(lambda: worker.statistics(SESSION).duplicates == 2)
        assert nothing_comes(link)
    assert computing.layers == [5]


def test_a_worker_answers_a_coordinator_whose_address_changed() -> None:
    with relayed(Computing()) as (link, _, relay):
        for layer in (0, 1):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
            assert set(collect(link)) == {(1, layer)}
            relay.move()


def test_a_replayed_recording_moves_nothing() -> None:
    computing = Computing()
    with connected(computing) as (link, worker), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        recorded = link._workers[1].sealer.seal(Kind.PING, bytes(8))
        other.settimeout(0.1)
        other.sendto(recorded, (HOST, worker.port))
        assert len(other.recv(2000)) > 0  # the first time it is authentic
        other.sendto(recorded, (HOST, worker.port))
        with pytest.raises(TimeoutError):
            other.recv(2000)
        assert worker.statistics(SESSION).duplicates == 1


# --- steps ----------------------------------------------------------------------------------------


def test_answers_to_an_earlier_step_are_stale() -> None:
    computing = Computing()
    with connected(computing) as (link, _):
        computing.gate.clear()
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        computing.started.acquire()
        link.begin_step(2)
        computing.gate.set()
        until(lambda: nothing_comes(link, 0.02) and link.statistics(1).stale == 7)
        link.repeat(1, 1, 5, -1)  # of a step that is over: nothing is sent
        assert link.statistics(1).repeats == 0


def test_a_newer_step_ends_what_waits_of_the_older() -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        computing.gate.clear()
        for layer in range(4):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        computing.started.acquire()
        link.begin_step(2)
        link.send(1, 2, 9, 1, INPUTS, plan=1)
        computing.gate.set()
        assert set(collect(link)) == {(1, 9)}
        assert computing.layers == [0, 9]
        assert worker.statistics(SESSION).bad == 0


def test_requests_of_an_older_step_are_not_worked_on() -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        link.begin_step(5)
        link.send(1, 5, 0, 1, INPUTS, plan=1)
        collect(link)
        link.begin_step(4)
        link.send(1, 4, 1, 1, INPUTS, plan=1)
        until(lambda: worker.statistics(SESSION).stale == 2)
        assert nothing_comes(link)
    assert computing.layers == [0]


def test_waiting_requests_are_worked_on_in_the_order_of_their_layers() -> None:
    computing = Computing()
    with connected(computing) as (link, _):
        computing.gate.clear()
        for layer in (9, 7, 3, 5):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
            if layer == 9:
                computing.started.acquire()
        computing.gate.set()
        collect(link, layers=4)
    assert computing.layers == [9, 3, 5, 7]


def test_coordinators_take_turns() -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        join(link, worker, worker.port, number=2, session=8)
        computing.gate.clear()
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        computing.started.acquire()
        for layer in (1, 2, 3):
            for number in (1, 2):
                link.send(number, 1, layer, 1, INPUTS, plan=1)
        computing.gate.set()
        collect(link, layers=7)
    sessions = [session for session, _, _ in computing.calls[1:]]
    assert sessions in ([7, 8] * 3, [8, 7] * 3)


# --- the link's own borders -----------------------------------------------------------------------


def test_a_network_that_is_down_is_counted_and_fails_nothing() -> None:
    link = UdpLink(HOST)
    try:
        link.add_worker(1, "255.255.255.255", 9, SESSION, os.urandom(32))  # which the system does not send to
        link.begin_step(1)
        link.send(1, 1, 0, 1, INPUTS, plan=1, copies=2)
        link.ping(1)
        assert link.statistics(1).unsent == 5
        assert link.statistics(1).sent == link.statistics(1).sent_bytes == 0
        assert link.receive(0.01) is None
    finally:
        link.close()


def test_workers_come_and_go() -> None:
    with connected(Computing()) as (link, worker):
        with pytest.raises(RequestError, match="session 7 is that of worker 1"):
            link.add_worker(2, HOST, worker.port, SESSION, os.urandom(32))
        join(link, worker, worker.port, number=1, session=9)  # instead of the one before
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 0)}
        assert worker.statistics(9).received == 2
        link.remove_worker(1)
        link.remove_worker(1)
        with pytest.raises(RequestError, match="worker 1 is not one of this link's"):
            link.send(1, 1, 1, 1, INPUTS, plan=1)


def test_a_request_of_another_step_than_the_current_is_a_mistake() -> None:
    with connected(Computing()) as (link, _), pytest.raises(RequestError, match="begin_step"):
        link.send(1, 2, 0, 1, INPUTS, plan=1)


def test_only_what_the_current_step_asked_for_is_repeated() -> None:
    with connected(Computing()) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        link.begin_step(2)
        link.repeat(1, 1, 5, -1)
        link.repeat(1, 2, 5, -1)
        link.send(1, 2, 6, 1, INPUTS, plan=1)
        link.repeat(1, 1, 6, -1)
        assert link.statistics(1).repeats == 0


@pytest.mark.parametrize("size", [0, 255, 65_508])
def test_a_datagram_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(RequestError, match=f"datagrams of {size} bytes"):
        UdpLink(HOST, datagram_bytes=size)
    with pytest.raises(RequestError, match=f"datagrams of {size} bytes"):
        UdpWorker(HOST, 0, Computing(), datagram_bytes=size)
