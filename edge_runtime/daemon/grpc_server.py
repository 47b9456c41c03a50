"""The gRPC server: its services, its limits, its port."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_runtime.daemon.auth import Gate
from edge_runtime.daemon.grpc_boundary import Boundary
from edge_runtime.daemon.grpc_daemon import DaemonServicer
from edge_runtime.daemon.grpc_health import HealthServicer
from edge_runtime.daemon.grpc_inference import InferenceServicer
from edge_runtime.daemon.grpc_models import ModelsServicer
from edge_runtime.daemon.grpc_personalization import PersonalizationServicer
from edge_runtime.errors import ConfigError
from edge_runtime.grpc_guard import PACKAGE, STALL_SECONDS
from edge_runtime.v1 import (
    daemon_pb2_grpc,
    inference_pb2_grpc,
    models_pb2_grpc,
    personalization_pb2_grpc,
)

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service

SERVICES = tuple(f"{PACKAGE}.{name}" for name in ("Inference", "Models", "Personalization", "Daemon"))
HEALTH_SERVICE = "grpc.health.v1.Health"

_STREAMS_A_CONNECTION = 256
_OTHER_CALLS = 64  # beside the requests that wait or run: health, status, tokenizing


class GrpcServer:
    """The gRPC API on one address. Make and use it on the event loop of the service.

    Args:
        service: the core; started already, or about to be.
        gate: decides on tokens.
        address: HOST:PORT to listen at; port 0 for any free one.
        credentials: of TLS; None for none.
        shut_down: begins an orderly end of the daemon and returns at once; called for Daemon.Shutdown.
        stall_seconds: a stream's client that takes nothing for so long is given up.

    Attributes:
        port: that it listens at, real once `start` has returned.
    """

    def __init__(
        self,
        service: Service,
        gate: Gate,
        *,
        address: str,
        shut_down: Callable[[], None],
        credentials: grpc.ServerCredentials | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.port = 0
        self._address = address
        self._credentials = credentials
        self._health = HealthServicer((*SERVICES, HEALTH_SERVICE))
        config = service.config
        self._server = grpc.aio.server(
            interceptors=(Boundary(gate, stall_seconds=stall_seconds),),
            options=_options(config.server.max_body_bytes),
            maximum_concurrent_rpcs=config.scheduling.queue + config.model.sequences + _OTHER_CALLS,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        models_pb2_grpc.add_ModelsServicer_to_server(ModelsServicer(service), self._server)
        personalization_pb2_grpc.add_PersonalizationServicer_to_server(
            PersonalizationServicer(service.personalization), self._server
        )
        daemon_pb2_grpc.add_DaemonServicer_to_server(DaemonServicer(service, shut_down), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                self.port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"server.grpc = {self._address!r}: cannot listen there; is the port in use, or the address "
                "another device's? Choose another one, or port 0 for any"
            ) from error
        await self._server.start()
        return self.port

    def announce_stop(self) -> None:
        """The health service says NOT_SERVING from now on. The service itself refuses what is new."""
        self._health.stop()

    async def stop(self, seconds: float = 1.0) -> None:
        """Take nothing new, let what runs end for so long, cancel the rest.

        Call it after the service's own stop, which ends running answers; what is left here is to deliver.
        """
        self.announce_stop()
        await self._server.stop(seconds)


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", _STREAMS_A_CONNECTION),
        # Otherwise a second daemon could listen at the same port, and calls would go to either.
        ("grpc.so_reuseport", 0),
        # A client whose network went away without a word is found out within 40 s, and its requests end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Clients may ask for signs of life as well, but not more often than this.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
        # Connections that nobody uses cost descriptors; clients connect anew by themselves.
        ("grpc.max_connection_idle_ms", 15 * 60_000),
    ]
