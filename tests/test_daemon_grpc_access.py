"""Who may call the gRPC API, and what it tells of itself: tokens, health, reflection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_fixture import GrpcDaemon, config_of
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_stubs import Stubs, bearer, failed

from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.grpc_boundary import METHOD_SCOPES
from edge_runtime.daemon.grpc_server import SERVICES
from edge_runtime.v1 import (
    daemon_pb2,
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


# --- who may call -----------------------------------------------------------------------------


def test_tokens_are_asked_for_and_checked(tmp_path: Path) -> None:
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        user = daemon.token("user", Scope.INFER)

        def status(*metadata: tuple[str, str | bytes]) -> str:
            try:
                stubs.daemon.GetStatus(daemon_pb2.GetStatusRequest(), metadata=metadata)
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]
            return "OK"

        assert status() == "UNAUTHENTICATED"
        assert status(("authorization", f"Bearer {user}")) == "OK"
        assert status(("authorization", f"bearer  {user} ")) == "OK"
        for wrong in (
            user,
            f"Basic {user}",
            "Bearer",
            f"Bearer {user}x",
            f"Bearer {user[:-1]}",
            "Bearer " + "x" * 5000,
        ):
            assert status(("authorization", wrong)) == "UNAUTHENTICATED", wrong
        assert status(*bearer(user), *bearer(user)) == "INVALID_ARGUMENT"
        code, message, metadata = failed(
            lambda: stubs.daemon.Shutdown(daemon_pb2.ShutdownRequest(), metadata=bearer(user))
        )
        assert (code, metadata["edgert-code"]) == (grpc.StatusCode.PERMISSION_DENIED, "permission_denied")
        assert user not in message
        assert daemon.shutdowns == 0
        daemon.tokens.revoke("user")
        daemon.gate.reload()
        assert status(*bearer(user)) == "UNAUTHENTICATED"
        found = [status(*bearer("edgert_guess")) for _ in range(12)]
        assert found[-1] == "RESOURCE_EXHAUSTED"
        again = daemon.token("user", Scope.INFER)
        assert status(*bearer(again)) == "OK"  # right ones are let in all the same


def test_a_token_is_asked_for_before_the_message_is_looked_at(tmp_path: Path) -> None:
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        for method in METHOD_SCOPES:
            if METHOD_SCOPES[method] is not None:
                call = stubs.channel.stream_stream(method)
                status, _, _ = failed(lambda call=call: list(call(iter([b"\xff"]))))  # type: ignore[misc]
                assert status is grpc.StatusCode.UNAUTHENTICATED, method


# --- health and reflection --------------------------------------------------------------------


def test_health_needs_no_token_and_knows_each_service(tmp_path: Path) -> None:
    states = health_pb2.HealthCheckResponse
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        for name in ("", *SERVICES, "grpc.health.v1.Health"):
            assert stubs.health.Check(health_pb2.HealthCheckRequest(service=name)).status == states.SERVING
        status, _, _ = failed(lambda: stubs.health.Check(health_pb2.HealthCheckRequest(service="absent")))
        assert status is grpc.StatusCode.NOT_FOUND
        unknown = stubs.health.Watch(health_pb2.HealthCheckRequest(service="absent"))
        assert next(unknown).status == states.SERVICE_UNKNOWN
        unknown.cancel()
        watches = [stubs.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0])) for _ in range(2)]
        assert [next(watch).status for watch in watches] == [states.SERVING] * 2
        watches[0].cancel()
        daemon.call(daemon.server.announce_stop)
        assert stubs.health.Check(health_pb2.HealthCheckRequest()).status == states.NOT_SERVING
        assert [message.status for message in watches[1]] == [states.NOT_SERVING]


def test_reflection_tells_services_and_files_to_those_who_may_call(tmp_path: Path) -> None:
    config = config_of(server={"require_token": True})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="edge_runtime.v1.Inference"),
        ]
        status, _, _ = failed(lambda: list(stubs.reflection.ServerReflectionInfo(iter(asked))))
        assert status is grpc.StatusCode.UNAUTHENTICATED
        metadata = bearer(daemon.token("user", Scope.INFER))
        listed, file = stubs.reflection.ServerReflectionInfo(iter(asked), metadata=metadata)
        names = {service.name for service in listed.list_services_response.service}
        assert names >= {*SERVICES, "grpc.health.v1.Health"}
        assert b"GenerateRequest" in file.file_descriptor_response.file_descriptor_proto[0]
        raw = stubs.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        status, _, _ = failed(lambda: list(raw(iter([b"\xff"]), metadata=metadata)))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
