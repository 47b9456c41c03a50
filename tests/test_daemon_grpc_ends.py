"""Ends of the gRPC API: clients that go away, deadlines, its port, a daemon that stops."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_fixture import RAMBLING, GrpcDaemon, config_of
from grpc_health.v1 import health_pb2
from grpc_stubs import LONG, PROMPT, Stubs, failed, idle, wait_until

from edge_runtime.errors import ConfigError
from edge_runtime.v1 import (
    daemon_pb2,
    inference_pb2,
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def stubs(daemon: GrpcDaemon) -> Iterator[Stubs]:
    with Stubs(daemon.address) as made:
        yield made


# --- clients that go away ---------------------------------------------------------------------


def test_a_cancelled_call_frees_its_place_and_its_task(daemon: GrpcDaemon, stubs: Stubs) -> None:
    tasks, ended = daemon.tasks(), daemon.finished("cancelled")
    for _ in range(5):
        call = stubs.inference.Generate(LONG)
        next(call)
        call.cancel()
    wait_until(lambda: daemon.finished("cancelled") == ended + 5, "the requests have ended")
    wait_until(lambda: daemon.tasks() <= tasks, "nothing is left of the calls")


def test_a_client_that_is_killed_frees_its_place(daemon: GrpcDaemon) -> None:
    program = (
        "import sys, time; from edge_runtime.client import Client; "
        f"s = Client(sys.argv[1]).generate({PROMPT!r}, **{dict(RAMBLING)!r}); "
        "next(s); print('runs', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, daemon.address], stdout=subprocess.PIPE)
    assert process.stdout is not None
    ended = daemon.finished("cancelled")
    with process:
        assert process.stdout.readline() == b"runs\n"
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: daemon.finished("cancelled") == ended + 1, "the request has gone")


def test_a_deadline_ends_a_request_in_the_queue_as_well(tmp_path: Path) -> None:
    with GrpcDaemon(tmp_path, config_of(model={"sequences": 1})) as daemon, Stubs(daemon.address) as stubs:
        running = stubs.inference.Generate(LONG)
        next(running)
        waiting = stubs.inference.Generate(LONG, timeout=0.2)
        next(waiting)
        status, _, _ = failed(lambda: list(waiting))
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: len(daemon.call(daemon.service.status).requests) <= 1, "it left the queue")
        running.cancel()


def test_a_client_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
    request = inference_pb2.GenerateRequest(text=PROMPT, logprobs=20, sampling=LONG.sampling)
    with GrpcDaemon(tmp_path, stall_seconds=0.05) as daemon, Stubs(daemon.address, *small_window) as stubs:
        stalled = stubs.inference.Generate(request)
        next(stalled)
        wait_until(lambda: idle(daemon), "its request has gone", 30)
        assert daemon.call(daemon.service.status).finished == {"cancelled": 1}
        status, _, metadata = failed(lambda: list(stalled))
        assert (status.name, metadata["edgert-code"]) == ("DEADLINE_EXCEEDED", "deadline_exceeded")


# --- the port, and the end --------------------------------------------------------------------


def test_a_port_in_use_is_an_error(daemon: GrpcDaemon, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.grpc"):
        GrpcDaemon(tmp_path, config_of(model={"preload": False}), address=daemon.address)
    with pytest.raises(ConfigError, match=r"server\.grpc"):
        GrpcDaemon(tmp_path, config_of(model={"preload": False}), address="192.0.2.1:0")


def test_a_large_message_is_refused_by_the_setting(tmp_path: Path) -> None:
    config = config_of(server={"max_body_bytes": 10_000})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        request = inference_pb2.TokenizeRequest(text="a" * 9_900)
        assert stubs.inference.Tokenize(request).tokens
        request.text += "a" * 200
        status, _, _ = failed(lambda: stubs.inference.Tokenize(request))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stopping_ends_watches_at_once_and_running_answers_within_the_limit(tmp_path: Path) -> None:
    daemon = GrpcDaemon(tmp_path)
    with Stubs(daemon.address) as stubs:
        watch = stubs.health.Watch(health_pb2.HealthCheckRequest())
        next(watch)
        short = stubs.inference.Generate(
            inference_pb2.GenerateRequest(text=PROMPT, max_tokens=30, sampling=LONG.sampling)
        )
        next(short)
        began = time.monotonic()
        daemon.stop(10.0)
        assert time.monotonic() - began < 5
        assert list(short)[-1].finished.generated_tokens == 30
        assert [message.status for message in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        status, _, _ = failed(lambda: stubs.daemon.GetStatus(daemon_pb2.GetStatusRequest()))
        assert status is grpc.StatusCode.UNAVAILABLE
