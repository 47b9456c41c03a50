"""Who may call a device's Cluster service: the peer certificate's name, and the table of members."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from edge_runtime.cluster.authority import INVITATION
from edge_runtime.cluster.identity import check_name
from edge_runtime.cluster.members import Members, Standing
from edge_runtime.errors import (
    EdgeRuntimeError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnauthenticatedError,
    UnavailableError,
)
from edge_runtime.grpc_guard import PACKAGE, STALL_SECONDS, Guard

SERVICE = f"{PACKAGE}.Cluster"
JOIN = f"/{SERVICE}/Join"
CALLS_A_MEMBER = 64
WATCH_SECONDS = 1.0  # within which running calls of a member that was revoked end
_ASK_SECONDS = 1.0  # a caller with an unknown name makes this device ask the founder not more often

# Longest request, in bytes; the others are as long as the server takes them.
_MOST_BYTES = {
    f"/{SERVICE}/{method}": most
    for method, most in {
        "Join": 8 << 10,
        "Leave": 64,
        "Describe": 1 << 10,
        "FetchShard": 128,
        "OpenSession": 256,
        "CloseSession": 64,
    }.items()
}
_log = logging.getLogger("edgert.cluster")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the request that is being served.

    Attributes:
        name: of the member, from its certificate; of an invited device the invitation's identifier.
        host: the IP address that it calls from.
    """

    name: str
    host: str


_caller: ContextVar[Caller] = ContextVar("cluster_caller")


def current_caller() -> Caller:
    """The caller of the request that runs in this task."""
    return _caller.get()


class ControlGate(Guard):
    """Stands around every method of the Cluster service.

    Args:
        members: who takes part; read with each call, so that a member is out the moment it is revoked.
        ask_founder: brings the table up to date; called for a name that is not in it. None on the founder
            itself, whose table is the one that counts.
        stall_seconds: a stream's client that takes nothing for so long is given up.
    """

    def __init__(
        self,
        members: Members,
        *,
        ask_founder: Callable[[], Awaitable[object]] | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        super().__init__(stall_seconds=stall_seconds, most_bytes=_MOST_BYTES)
        self._members = members
        self._ask_founder = ask_founder
        self._asking = asyncio.Lock()
        self._asked = float("-inf")
        self._running: dict[asyncio.Task[Any], str] = {}  # at most as many as calls may run
        self._calls: Counter[str] = Counter()
        self._revoked: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def admitted(self, method: str, context: Any) -> AsyncIterator[None]:
        """Lets in members, and invited devices to Join. :func:`current_caller` says who it is."""
        name = _certificate_name(context.auth_context())
        host = host_of(context.peer())
        if name.startswith(INVITATION):
            if method != JOIN:
                raise ForbiddenError("an invitation is good for joining alone; join first")
            caller = Caller(name.removeprefix(INVITATION), host)
        else:
            if method == JOIN:
                raise RequestError(f"{name} is a member already; `edgert cluster leave` first")
            await self._check_standing(check_name(name))
            caller = Caller(name, host)
        _caller.set(caller)
        async with self._counted(name):
            yield

    async def watch(self) -> None:
        """End running calls of members that are revoked meanwhile; runs until it is cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            names = {name for name in self._running.values() if not name.startswith(INVITATION)}
            if not names:
                continue
            try:
                gone = await asyncio.to_thread(self._members.revoked_among, names)
            except EdgeRuntimeError as error:
                _log.error("the table of members cannot be read: %s", error)
                continue
            for task, name in list(self._running.items()):
                if name in gone and task not in self._revoked:
                    self._revoked.add(task)
                    task.cancel()

    @asynccontextmanager
    async def _counted(self, name: str) -> AsyncIterator[None]:
        if self._calls[name] >= CALLS_A_MEMBER:
            raise OverloadedError(f"{name} has {self._calls[name]} calls here already; end some first", 1.0)
        task = asyncio.current_task()
        assert task is not None  # a call always runs in one
        self._calls[name] += 1
        self._running[task] = name
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._revoked:
                raise
            task.uncancel()
            raise _revoked(name) from None
        finally:
            self._revoked.discard(task)
            del self._running[task]
            self._calls[name] -= 1
            if not self._calls[name]:
                del self._calls[name]

    async def _check_standing(self, name: str) -> None:
        standing = self._members.standing(name)
        if standing is Standing.UNKNOWN and self._ask_founder is not None:
            async with self._asking:
                # Another call may have asked while this one waited.
                standing = self._members.standing(name)
                loop = asyncio.get_running_loop()
                if standing is Standing.UNKNOWN and loop.time() - self._asked >= _ASK_SECONDS:
                    self._asked = loop.time()
                    await self._ask(name)
                    standing = self._members.standing(name)
        if standing is Standing.REVOKED:
            raise _revoked(name)
        if standing is Standing.UNKNOWN:
            raise ForbiddenError(f"{name} is no member that this device knows; join the cluster again")

    async def _ask(self, name: str) -> None:
        assert self._ask_founder is not None
        try:
            await self._ask_founder()
        except EdgeRuntimeError as error:
            raise UnavailableError(
                f"this device does not know {name} yet and cannot ask the founder of the cluster ({error}); "
                "try again once it is there"
            ) from error


def host_of(peer: str) -> str:
    """The IP address in a gRPC peer: ``ipv4:10.0.0.7:4711``, ``ipv6:%5Bfe80::1%25eth0%5D:4711``.

    Raises:
        RequestError: the peer has none, as over a Unix socket.
    """
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        raise RequestError(f"the call comes over {kind!r}; the Cluster service is spoken to over IP")
    return urllib.parse.unquote(rest).rpartition(":")[0].strip("[]")


def _revoked(name: str) -> ForbiddenError:
    return ForbiddenError(f"{name} is no member any more; a new invitation lets the device join again")


def _certificate_name(found: Mapping[Any, Any]) -> str:
    """The one common name of the certificate that the other side showed."""
    names: Sequence[Any] = found.get("x509_common_name") or ()
    if len(names) == 1:
        with contextlib.suppress(UnicodeDecodeError):
            return bytes(names[0]).decode("ascii")
    raise UnauthenticatedError("the certificate has no name, or several; join the cluster again")
