"""The border of the gRPC API: who may call what. The rest of it is :mod:`edge_runtime.grpc_guard`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from edge_runtime.daemon.auth import LOCAL, Gate, Identity, Scope, bearer_token, source_of
from edge_runtime.errors import RequestError
from edge_runtime.grpc_guard import PACKAGE, STALL_SECONDS, Guard

# What each method needs; None: nothing. A method that is not here needs the scope admin.
METHOD_SCOPES: dict[str, Scope | None] = {
    **{
        f"/{PACKAGE}.Inference/{name}": Scope.INFER
        for name in ("Generate", "Chat", "Tokenize", "Detokenize", "Embed")
    },
    f"/{PACKAGE}.Models/List": Scope.INFER,
    f"/{PACKAGE}.Models/Describe": Scope.INFER,
    f"/{PACKAGE}.Models/Pull": Scope.ADMIN,
    f"/{PACKAGE}.Models/Load": Scope.ADMIN,
    f"/{PACKAGE}.Models/Unload": Scope.ADMIN,
    f"/{PACKAGE}.Models/Remove": Scope.ADMIN,
    **{
        f"/{PACKAGE}.Personalization/{name}": Scope.PERSONALIZE
        for name in (
            *("Apply", "Forget", "Follow", "Cancel", "List", "Show", "Revert", "Reapply"),
            *("Remove", "Evaluate", "Export", "Import", "Prepare"),
        )
    },
    f"/{PACKAGE}.Daemon/GetStatus": Scope.INFER,
    f"/{PACKAGE}.Daemon/Shutdown": Scope.ADMIN,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.INFER,
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the request that is being served.

    Attributes:
        name: a token's name, or the address where no token was sent: between these the queue is fair.
        identity: what it may do.
    """

    name: str
    identity: Identity


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """The caller of the request that runs in this task."""
    return _caller.get()


class Boundary(Guard):
    """Stands around every method of the server.

    Args:
        gate: decides on tokens.
        stall_seconds: a stream's client that takes nothing for so long is given up.
    """

    def __init__(self, gate: Gate, *, stall_seconds: float = STALL_SECONDS) -> None:
        super().__init__(stall_seconds=stall_seconds)
        self._gate = gate

    @asynccontextmanager
    async def admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """Lets in whom the gate admits; :func:`current_caller` says whom."""
        _caller.set(self._admit(method, context))
        yield

    def _admit(self, method: str, context: Any) -> Caller:
        scope = METHOD_SCOPES.get(method, Scope.ADMIN)
        address = source_of(context.peer())
        if scope is None:
            return Caller(address, Identity(LOCAL, frozenset()))
        headers = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if len(headers) > 1:
            raise RequestError(f"{len(headers)} authorization entries; one is needed")
        header = headers[0] if headers else None
        if isinstance(header, bytes):
            header = header.decode("utf-8", "replace")
        identity = self._gate.admit(bearer_token(header), context.peer(), scope)
        return Caller(address if identity.name == LOCAL else identity.name, identity)
