"""What the tests of the gRPC API call it with, and what they look for in its failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_fixture import RAMBLING, GrpcDaemon
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from edge_runtime.v1 import (
    daemon_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2_grpc,
)

PROMPT = "The home of Paul Colton is in"
LONG = inference_pb2.GenerateRequest(text=PROMPT, sampling=inference_pb2.Sampling(**RAMBLING))
GREEDY = inference_pb2.Sampling(temperature=0)


class Stubs:
    """All stubs of one channel."""

    def __init__(self, address: str, *options: tuple[str, Any]) -> None:
        self.channel = grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1), *options))
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)
        self.daemon = daemon_pb2_grpc.DaemonStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(self.channel)

    def __enter__(self) -> Stubs:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def failed(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, message and trailing metadata of a call that fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code(), error.details(), dict(error.trailing_metadata())


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def idle(daemon: GrpcDaemon) -> bool:
    return not daemon.call(daemon.service.status).requests
