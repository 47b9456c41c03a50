"""The worker's thread and what it keeps: sessions, limits, and what others let it run."""

from __future__ import annotations

import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

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
    join,
    sums_of,
    until,
)

from edge_runtime.cluster import worker_session
from edge_runtime.cluster.datagram import read_request, request_bodies
from edge_runtime.cluster.exchange import Inputs, RefusalReason
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import MOST_POSTED, MOST_SESSIONS, UdpWorker
from edge_runtime.cluster.worker_session import Kept, WorkerSession
from edge_runtime.engine.activations import ActivationForm, decode, encode, kernel_form
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.shares import ShareComputer
from edge_runtime.errors import ConfigError, EdgeRuntimeError, OverloadedError, RequestError, UnavailableError

INPUTS = bytes(2176)


@pytest.fixture
def computing() -> Computing:
    return Computing()


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_opened_again_with_its_secret_goes_on(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        secret = join(link, worker, worker.port, number=2, session=8)
        link.send(2, 1, 0, 1, INPUTS, plan=1)
        collect(link)
        worker.add_session(8, secret, "coordinator")
        link.send(2, 1, 1, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(2, 1)}
        assert worker.statistics(8).received == 4


def test_a_secret_serves_one_session(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        secret = join(link, worker, worker.port, number=2, session=8)
        worker.remove_session(8)
        for session in (8, 9):
            with pytest.raises(RequestError, match="served a session before"):
                worker.add_session(session, secret, "coordinator")


def test_another_coordinators_session_is_not_taken_over(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        with pytest.raises(RequestError, match="another coordinator's"):
            worker.add_session(SESSION, os.urandom(32), "somebody else")
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 0)}


def test_sessions_are_limited(computing: Computing) -> None:
    with connected(computing) as (_, worker):
        for number in range(MOST_SESSIONS - 1):
            worker.add_session(100 + number, os.urandom(32), "coordinator")
        with pytest.raises(OverloadedError, match="64 sessions are open"):
            worker.add_session(99, os.urandom(32), "coordinator")
        worker.remove_session(100)
        worker.add_session(99, os.urandom(32), "coordinator")


def test_a_wrong_secret_is_refused_where_it_is_given(computing: Computing) -> None:
    with connected(computing) as (_, worker):
        with pytest.raises(RequestError, match="31 bytes; needed are 32"):
            worker.add_session(1, bytes(31), "coordinator")
        with pytest.raises(RequestError, match="no session 1"):
            worker.statistics(1)


def test_a_removed_session_gets_no_answer_to_what_waits(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        computing.gate.clear()
        for layer in (0, 1):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        computing.started.acquire()
        worker.remove_session(SESSION)
        computing.gate.set()
        worker.post(lambda: None).result(10)
        worker.post(lambda: None).result(10)
        assert computing.layers == [0]


# --- computing -----------------------------------------------------------------------------------


def test_the_engines_shares_come_back_as_computed_there(demo_model: Path) -> None:
    """Inputs travel in the kernel's own form, so not a bit differs from computing here."""
    gguf = GGUFFile(demo_model)
    slices = GroupSlices(gguf, read_hyperparameters(gguf))
    shape = slices.shape
    backend = Backend(1)
    computer = ShareComputer(shape, backend)
    form = kernel_form(shape.types[0][0])
    wanted = range(shape.n_groups // 2)
    shares = [
        computer.share(layer, {group: slices.group(layer, group) for group in wanted}) for layer in (0, 1)
    ]
    inputs = np.random.default_rng(3).standard_normal((2, shape.n_embd)).astype(np.float32)

    def compute(session: int, plan: int, layer: int, n_rows: int, content: Inputs) -> Floats:
        return computer.compute(shares[layer], decode(form, content, n_rows, shape.n_embd))

    expected = [computer.compute(share, inputs).copy() for share in shares]
    worker = UdpWorker(HOST, 0, compute)
    link = UdpLink(HOST)
    try:
        join(link, worker, worker.port)
        link.begin_step(1)
        for layer in (0, 1):
            link.send(1, 1, layer, 2, encode(form, inputs), plan=1, n_values=inputs.size)
        found = collect(link, inputs.size, layers=2)
        for layer in (0, 1):
            assert (found[1, layer] == expected[layer].reshape(-1)).all()
    finally:
        link.close()
        worker.stop()
        for share in shares:
            share.close()
        computer.close()
        backend.close()


def test_a_result_may_be_overwritten_by_the_next(computing: Computing) -> None:
    kept = np.empty((1, WIDTH), np.float32)

    def reuse(layer: int, sums: Floats) -> Floats:
        np.copyto(kept, sums)
        return kept

    computing.instead = reuse
    with connected(computing) as (link, _):
        for layer in range(6):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        for (_, layer), values in collect(link, layers=6).items():
            assert (values == sums_of(1, layer, 1, INPUTS)[0]).all()
            link.repeat(1, 1, layer, -1)
        until(lambda: link.receive(0.02) is None and link.statistics(1).duplicates == 42)


# --- limits ---------------------------------------------------------------------------------------


def new_session() -> WorkerSession:
    return WorkerSession(1, bytes(32), "coordinator")


def fields(layer: int, total: int, *, fragment: int = 0, plan: int = 1) -> worker_session.RequestFields:
    room = 1312
    bodies = request_bodies(1, layer, plan, 1, ActivationForm.F32, 1, bytes(total), room)
    return read_request(bodies[fragment])


def test_requests_beyond_the_limit_are_refused_until_others_are_done(computing: Computing) -> None:
    session = new_session()
    size = 1 << 20
    taken = [session.take_in(fields(layer, size)) for layer in range(9)]
    assert taken == [False] * 8 + [None]
    session.begin_step(2)
    assert session.take_in(fields(9, size)) is False


def test_answers_beyond_the_limit_are_forgotten_oldest_first(computing: Computing) -> None:
    session = new_session()
    bodies = [bytes(1 << 20)] * 9
    for layer in range(4):
        session.keep(layer, Kept(list(bodies), ActivationForm.F32, 1))
    kept = [session.kept(layer) for layer in range(5)]
    assert [bool(one and one.bodies) for one in kept] == [False, True, True, True, False]
    assert kept[0] is not None  # known to have been answered, so that it is not computed again
    session.begin_step(2)
    assert session.kept(3) is None


def test_a_repeat_of_a_forgotten_answer_is_refused(
    computing: Computing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_session, "MOST_KEPT_BYTES", 9000)
    with connected(computing) as (link, _):
        for layer in (0, 1):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        collect(link, layers=2)
        link.repeat(1, 1, 0, 1)
        until(lambda: link.receive(0.05) is None and link.statistics(1).refusals == 1)
        assert [refusal.reason for refusal in link.take_refusals()] == [RefusalReason.FORGOTTEN]
        assert computing.layers == [0, 1]


# --- what others let it run -----------------------------------------------------------------------


def test_posted_calls_run_in_the_thread_that_computes(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        collect(link)
        found = [worker.post(threading.get_ident).result(10) for _ in range(20)]
        assert set(found) == computing.threads != {threading.get_ident()}


def test_a_posted_calls_error_is_its_callers(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        with pytest.raises(ZeroDivisionError):
            worker.post(lambda: 1 / 0).result(10)
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        assert set(collect(link)) == {(1, 0)}


def test_posted_calls_and_requests_take_turns(computing: Computing) -> None:
    order: list[str] = []

    def note(layer: int, sums: np.ndarray) -> np.ndarray:
        order.append(f"layer {layer}")
        return sums

    with connected(computing) as (link, worker):
        computing.instead = note
        computing.gate.clear()
        for layer in range(3):
            link.send(1, 1, layer, 1, INPUTS, plan=1)
        computing.started.acquire()
        futures = [worker.post(lambda number=number: order.append(f"call {number}")) for number in range(2)]
        computing.gate.set()
        collect(link, layers=3)
        assert [future.result(10) for future in futures] == [None, None]
    assert order == ["layer 0", "call 0", "layer 1", "call 1", "layer 2"]


def test_posted_calls_are_limited_and_may_be_cancelled(computing: Computing) -> None:
    with connected(computing) as (link, worker):
        computing.gate.clear()
        link.send(1, 1, 0, 1, INPUTS, plan=1)
        computing.started.acquire()
        ran: list[int] = []
        futures = [worker.post(lambda number=number: ran.append(number)) for number in range(MOST_POSTED)]
        with pytest.raises(OverloadedError, match="64 computations wait"):
            worker.post(lambda: None)
        assert futures[3].cancel()
        computing.gate.set()
        futures[-1].result(10)
        assert ran == [number for number in range(MOST_POSTED) if number != 3]
        with pytest.raises(CancelledError):
            futures[3].result(0)


# --- the end --------------------------------------------------------------------------------------


def test_stopping_ends_the_thread_and_what_waits(computing: Computing) -> None:
    worker = UdpWorker(HOST, 0, computing)
    link = UdpLink(HOST)
    join(link, worker, worker.port)
    link.begin_step(1)
    computing.gate.clear()
    link.send(1, 1, 0, 1, INPUTS, plan=1)
    computing.started.acquire()
    waiting = worker.post(lambda: None)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: worker._stopping)
    computing.gate.set()
    stopping.join(10)
    assert not worker._thread.is_alive()
    # It runs what is posted once more after a computation, or ends before.
    error = waiting.exception(10)
    assert error is None or isinstance(error, UnavailableError)
    with pytest.raises(UnavailableError, match="stopped"):
        worker.post(lambda: None)
    worker.stop()
    link.close()
    UdpWorker(HOST, worker.port, computing).stop()  # the port is free


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70_000), ("no such host", 0)])
def test_an_address_that_cannot_be_bound_is_named(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"{host} port {port} cannot be bound"):
        UdpWorker(host, port, Computing())


def test_a_host_that_is_not_known_is_named() -> None:
    link = UdpLink(HOST)
    try:
        with pytest.raises(EdgeRuntimeError, match=r"no address for no\.such\.host\.invalid"):
            link.add_worker(1, "no.such.host.invalid", 1, SESSION, os.urandom(32))
    finally:
        link.close()
