"""The standard health service.

Not the one of grpcio-health-checking: there a second watcher of a service hears nothing more once the first
has gone, and open watches hold up the end of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb

_States = pb.HealthCheckResponse


class HealthServicer:
    """Tells whether a service takes requests: from the start on yes, once it is stopping no.

    Args:
        services: full names; the empty one, for the whole server, is always there.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({"", *services})
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """From now on NOT_SERVING; watches hear it and end."""
        self._stopping.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:  # noqa: N802
        """The state at this moment; NOT_FOUND for a service that is none."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name")
        return self._state(request.service)

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The state, and each change of it."""
        stopped = self._stopping.is_set()  # before the first message: the stop may come while that is sent
        yield self._state(request.service)
        await self._stopping.wait()
        if not stopped:
            yield self._state(request.service)

    def _state(self, service: str) -> pb.HealthCheckResponse:
        if service not in self._services:
            return _States(status=_States.SERVICE_UNKNOWN)
        return _States(status=_States.NOT_SERVING if self._stopping.is_set() else _States.SERVING)
