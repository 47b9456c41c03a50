"""The Daemon service of the gRPC API."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.grpc_boundary import Caller, current_caller
from edge_runtime.daemon.grpc_cluster import cluster_status
from edge_runtime.daemon.grpc_models import loaded_model
from edge_runtime.daemon.status import RequestStatus
from edge_runtime.v1 import daemon_pb2 as pb
from edge_runtime.v1 import daemon_pb2_grpc

if TYPE_CHECKING:
    from edge_runtime.daemon.service import Service

_STATES = {
    "queued": pb.REQUEST_STATE_QUEUED,
    "prefill": pb.REQUEST_STATE_PREFILL,
    "decode": pb.REQUEST_STATE_DECODE,
}


class DaemonServicer(daemon_pb2_grpc.DaemonServicer):
    """Status and end of the daemon.

    Args:
        shut_down: begins an orderly end and returns at once.
    """

    def __init__(self, service: Service, shut_down: Callable[[], None]) -> None:
        self._service = service
        self._shut_down = shut_down

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        """The daemon at this moment."""
        status = self._service.status()
        caller = current_caller()
        cluster = status.cluster
        if cluster is not None and Scope.ADMIN not in caller.identity.scopes:
            cluster = cluster.without_addresses()
        return pb.GetStatusResponse(
            version=status.version,
            pid=status.pid,
            started=status.started,
            ready=status.ready,
            reason=status.reason,
            stopping=status.stopping,
            default_model=status.default_model,
            models=[loaded_model(model) for model in status.models],
            requests=[_request(request) for request in status.requests if _may_see(caller, request)],
            queue_limit=status.queue_limit,
            finished=status.finished,
            prompt_tokens=status.prompt_tokens,
            generated_tokens=status.generated_tokens,
            speed=status.speed,
            memory_bytes=status.memory_bytes,
            memory_available_bytes=status.memory_available_bytes,
            temperature=status.temperature,
            cpu_percent=status.cpu_percent,
            cluster=cluster_status(cluster) if cluster is not None else None,
        )

    async def Shutdown(self, request: pb.ShutdownRequest, context: Any) -> pb.ShutdownResponse:  # noqa: N802
        """The daemon's orderly end."""
        self._shut_down()
        return pb.ShutdownResponse()


def _may_see(caller: Caller, request: RequestStatus) -> bool:
    return Scope.ADMIN in caller.identity.scopes or request.client == caller.name


def _request(request: RequestStatus) -> pb.Request:
    return pb.Request(
        id=request.id,
        client=request.client,
        model=request.model,
        state=_STATES[request.state],
        prompt_tokens=request.prompt_tokens,
        generated_tokens=request.generated_tokens,
        seconds=request.seconds,
    )
