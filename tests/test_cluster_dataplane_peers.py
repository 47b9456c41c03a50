"""Peers that refuse, err or lie, and strangers: what they send is told apart, counted, and does no harm."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
from dataplane_fixture import (
    HOST,
    SESSION,
    WIDTH,
    Computing,
    Floats,
    collect,
    connected,
    nothing_comes,
    sums_of,
    until,
)

from edge_runtime.cluster import datagram as wire
from edge_runtime.cluster.datagram import Kind
from edge_runtime.cluster.exchange import Refusal, RefusalReason, RefusedError
from edge_runtime.cluster.sealing import HEADER, VERSION, Direction, Sealer, preferred_cipher
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.engine.activations import ActivationForm

INPUTS = random.Random(1).randbytes(2176)


# --- refusals and wrong answers -------------------------------------------------------------------


def refused(link: UdpLink) -> list[Refusal]:
    found: list[Refusal] = []
    until(lambda: link.receive(0.05) is None and bool(found.extend(link.take_refusals()) or found))
    return found


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RefusedError(RefusalReason.PLAN), RefusalReason.PLAN),
        (RefusedError(RefusalReason.INVALID), RefusalReason.INVALID),
        (RuntimeError("broken"), RefusalReason.FAILED),
    ],
    ids=["plan", "invalid", "failed"],
)
def test_a_failure_is_told_and_ends_nothing(error: Exception, reason: RefusalReason) -> None:
    def fail(layer: int, sums: Floats) -> Floats:
        raise error

    computing = Computing()
    computing.instead = fail
    with connected(computing) as (link, worker):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert refused(link) == [Refusal(1, 1, 5, reason)]
        assert worker.statistics(SESSION).refusals == link.statistics(1).refusals == 1
        computing.instead = None
        link.repeat(1, 1, 5, -1)  # a refused request may be asked again, and is computed then
        assert set(collect(link)) == {(1, 5)}


@pytest.mark.parametrize(
    "result",
    [
        np.zeros((2, WIDTH), np.float32),
        np.zeros((1, WIDTH)),
        np.zeros(WIDTH, np.float32),
        np.zeros((1, 0), np.float32),
    ],
    ids=["rows", "type", "dimensions", "empty"],
)
def test_a_wrong_result_of_computing_is_a_failure(result: Floats) -> None:
    computing = Computing()
    computing.instead = lambda layer, sums: result
    with connected(computing) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert [refusal.reason for refusal in refused(link)] == [RefusalReason.FAILED]


def test_numbers_that_are_none_are_dropped_and_counted() -> None:
    def spoil(layer: int, sums: Floats) -> Floats:
        sums[0, ::500] = np.nan
        return sums

    computing = Computing()
    computing.instead = spoil
    with connected(computing) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        until(lambda: link.receive(0.02) is None and link.statistics(1).received == 7)
        assert link.statistics(1).bad == 5


@pytest.mark.parametrize("width", [32, 2016, 4096])
def test_an_answer_of_another_length_is_dropped_and_counted(width: int) -> None:
    with connected(Computing(width=width)) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1, n_values=WIDTH)
        until(lambda: nothing_comes(link, 0.02) and link.statistics(1).bad > 0)
        assert link.statistics(1).bad == link.statistics(1).received


def test_a_restarted_worker_says_that_it_knows_no_such_session() -> None:
    with connected(Computing()) as (link, worker):
        worker.remove_session(SESSION)
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert refused(link) == [Refusal(1, 1, -1, RefusalReason.SESSION)]
        assert link.last_seen(1) == -np.inf  # anyone can say so
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(HEADER.pack(VERSION, Kind.NO_SESSION, 0, SESSION, 0), (HOST, link.port))
        assert nothing_comes(link) and not link.take_refusals()  # so it is heeded once a second


def test_an_answer_nobody_asked_for_is_dropped_and_counted() -> None:
    with connected(Computing()) as (link, _):
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        until(lambda: link._socket.wait(1))
        link._workers[1].asked.clear()
        until(lambda: nothing_comes(link, 0.02) and link.statistics(1).bad == 7)


def answer(
    layer: int = 5, width: int = WIDTH, form: ActivationForm = ActivationForm.F32, rows: int = 1
) -> list[bytes]:
    sums = np.ones((rows, width // rows), np.float32)
    return wire.answer_bodies(1, layer, 1, form, sums, 10, 1400)


LIES = {
    "another form": (Kind.ANSWER, answer(form=ActivationForm.F16)),
    "another layer": (Kind.ANSWER, answer(layer=6)),
    "more rows": (Kind.ANSWER, answer(rows=2)),
    "too short": (Kind.ANSWER, answer(width=64)),
    "cut off": (Kind.ANSWER, [answer()[0][:-4]]),
    "no answer": (Kind.ANSWER, [b"", b"nothing", bytes(wire.BODY.size)]),
    "a request": (Kind.REQUEST, answer()),
    "no kind": (77, answer()),  # type: ignore[dict-item]
    "refusal of another layer": (Kind.REFUSED, [wire.REFUSED.pack(1, 6, 1, RefusalReason.PLAN)]),
    "refusal for no reason": (Kind.REFUSED, [wire.REFUSED.pack(1, 5, 1, 99)]),
    "refusal cut off": (Kind.REFUSED, [b"", bytes(3)]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_lies_is_counted_and_heard_no_further(lie: str) -> None:
    kind, bodies = LIES[lie]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as liar:
        liar.bind((HOST, 0))
        link = UdpLink(HOST)
        try:
            secret = os.urandom(32)
            link.add_worker(1, HOST, liar.getsockname()[1], SESSION, secret)
            sealer = Sealer(secret, SESSION, Direction.TO_COORDINATOR, preferred_cipher())
            link.begin_step(1)
            link.send(1, 1, 5, 1, INPUTS, plan=1, n_values=WIDTH)
            for body in bodies:
                liar.sendto(sealer.seal(kind, body), (HOST, link.port))
            until(lambda: link.receive(0.01) is None and link.statistics(1).received == len(bodies))
            assert link.statistics(1).bad == len(bodies)
            assert not link.take_refusals()
            for body in answer():
                liar.sendto(sealer.seal(Kind.ANSWER, body), (HOST, link.port))
            (found,) = collect(link).values()  # of the right shape, so it is the coordinator's to judge
            assert (found == 1).all()
        finally:
            link.close()


def test_an_answer_that_changes_its_shape_is_dropped() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as liar:
        liar.bind((HOST, 0))
        link = UdpLink(HOST)
        try:
            secret = os.urandom(32)
            link.add_worker(1, HOST, liar.getsockname()[1], SESSION, secret)
            sealer = Sealer(secret, SESSION, Direction.TO_COORDINATOR, preferred_cipher())
            link.begin_step(1)
            link.send(1, 1, 5, 1, INPUTS, plan=1)
            bodies = [answer()[0], answer(width=1024)[1], *answer()[1:]]
            for body in bodies:
                liar.sendto(sealer.seal(Kind.ANSWER, body), (HOST, link.port))
            collect(link)
            assert link.statistics(1).bad == 1
        finally:
            link.close()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.REQUEST, b""),
        (Kind.REQUEST, bytes(100)),
        (Kind.PING, bytes(7)),
        (Kind.ANSWER, answer()[0]),
        (0, b""),
    ],
    ids=["empty", "zeros", "ping", "answer", "no kind"],
)
def test_a_coordinator_that_errs_is_counted_and_served_on(kind: int, body: bytes) -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        link._send(link._workers[1], kind, [body])  # type: ignore[arg-type]
        until(lambda: worker.statistics(SESSION).bad == 1)
        assert not computing.calls
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 5)}


def test_fragments_of_two_requests_are_not_mixed() -> None:
    computing = Computing()
    with connected(computing) as (link, worker):
        bodies = [
            wire.request_bodies(1, 5, plan, 1, ActivationForm.F32, 1, inputs, 1312)
            for plan, inputs in ((1, INPUTS), (2, INPUTS), (1, INPUTS[:-16]))
        ]
        sent = [bodies[0][0], bodies[1][1], bodies[2][1]]
        for body in sent:
            link._send(link._workers[1], Kind.REQUEST, [body])
        until(lambda: worker.statistics(SESSION).bad == 2)
        assert not computing.calls
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        (found,) = collect(link).values()
        assert (found == sums_of(1, 5, 1, INPUTS)[0]).all()


# --- strangers ------------------------------------------------------------------------------------


def test_a_worker_with_another_secret_gets_no_word_in() -> None:
    computing = Computing()
    worker = UdpWorker(HOST, 0, computing)
    link = UdpLink(HOST)
    try:
        worker.add_session(SESSION, os.urandom(32), "coordinator")
        link.add_worker(1, HOST, worker.port, SESSION, os.urandom(32))
        link.begin_step(1)
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        until(lambda: worker.statistics(SESSION).forged == 2)
        assert nothing_comes(link)
        assert not computing.calls and worker.statistics(SESSION).sent == 0
    finally:
        link.close()
        worker.stop()


def test_what_strangers_send_changes_nothing_for_the_others() -> None:
    noise = random.Random(2)
    with (
        connected(Computing()) as (link, worker),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        for number in range(300):
            kind, session = (
                noise.choice([*Kind, 0, 99]),
                noise.choice([SESSION, SESSION, noise.getrandbits(32)]),
            )
            head = HEADER.pack(VERSION, kind, noise.choice([0, 1, 2, 9]), session, noise.getrandbits(64))
            content = noise.randbytes(noise.randrange(100))
            for port in (worker.port, link.port):
                stranger.sendto(content if number % 2 else head + content, (HOST, port))
        link.take_refusals()
        link.send(1, 1, 5, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 5)}
        assert worker.statistics(SESSION).forged > 0 and worker.strange > 0
        assert link.statistics(1).forged > 0 and link.strange > 0
        assert link.statistics(1).bad == worker.statistics(SESSION).bad == 0
