"""The other members as this one knows them: one connection to each, and a table kept up to date."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.identity import Identity
from edge_runtime.cluster.members import MAX_MEMBERS, Member, Members, Standing, check_address
from edge_runtime.errors import (
    EdgeRuntimeError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from edge_runtime.v1 import cluster_pb2 as wire

REFRESH_SECONDS = 30.0
_CALL_SECONDS = 5.0
_AT_ONCE = 8
_MAX_HINTS = 256

_log = logging.getLogger("edgert.cluster")


@dataclass(frozen=True, slots=True)
class Peer:
    """A member as it answered, or did not.

    Attributes:
        description: None where it did not answer; `error` says why.
        round_trip_seconds: of that call, the connection's opening included the first time.
    """

    member: Member
    description: wire.DescribeResponse | None
    error: str = ""
    round_trip_seconds: float = 0.0


class Peers:
    """Connections to the other members. Make and use it on one event loop.

    Args:
        identity: this device's.
        members: the table.
        own_address: HOST:PORT of this device's Cluster service, told to each member; a host of 0.0.0.0
            stands for the address that the member sees.
    """

    def __init__(self, identity: Identity, members: Members, own_address: str) -> None:
        self.identity = identity
        self.members = members
        self._own_address = own_address
        self._clients: dict[str, ControlClient] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._hints: dict[str, None] = {}  # addresses that may be members', oldest first

    def client(self, name: str) -> ControlClient:
        """The connection to a member, opened with its first call.

        Raises:
            RequestError: there is no such member.
        """
        member = self.members.find(name)
        if member is None or member.revoked is not None or name == self.identity.name:
            raise RequestError(f"{name} is no other member of this cluster")
        return self._client(member)

    def hint(self, addresses: Iterable[str]) -> None:
        """Addresses under which members may be, of the settings or of mDNS; they are asked at each refresh.

        Raises:
            RequestError: one is no address.
        """
        for address in addresses:
            self._hints.pop(check_address(address), None)
            self._hints[address] = None
            if len(self._hints) > _MAX_HINTS:
                self._hints.pop(next(iter(self._hints)))

    async def ask_founder(self) -> None:
        """Bring the table up to date by the founder's; nothing on the founder itself.

        Raises:
            UnavailableError, DeadlineError: it cannot be reached.
            ForbiddenError: this device is no member any more.
        """
        if self.identity.is_founder:
            return
        founder = await asyncio.to_thread(self.members.founder)
        if founder is None:
            raise UnavailableError("this device does not know the founder of its cluster; join again")
        description = await self._client(founder).describe(self._own_address)
        await self._learn(founder.name, description)

    async def refresh(self) -> list[Peer]:
        """Ask the founder who is a member, then every member how it is, at hinted addresses as well.

        Members that do not answer stay members. Returns all others, by name.

        Raises:
            ForbiddenError: this device is no member any more.
        """
        try:
            await self.ask_founder()
        except ForbiddenError:
            raise
        except EdgeRuntimeError as error:
            _log.info("the founder of the cluster does not answer: %s", error)
        await self._follow_hints()
        everyone = await asyncio.to_thread(self.members.active)
        others = [member for member in everyone if member.name != self.identity.name]
        await self._forget({member.name for member in others})
        turns = asyncio.Semaphore(_AT_ONCE)
        return list(await asyncio.gather(*(self._ask(member, turns) for member in others)))

    async def close(self) -> None:
        """End all connections."""
        await self._forget(set())
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _client(self, member: Member) -> ControlClient:
        found = self._clients.get(member.name)
        if found is None or found.address != member.address:
            if found is None and len(self._clients) >= MAX_MEMBERS:
                raise OverloadedError(f"{len(self._clients)} connections to members are open", 1.0)
            if found is not None:
                self._close_later(found)
            found = ControlClient(self.identity, member.address, member.name, timeout=_CALL_SECONDS)
            self._clients[member.name] = found
        return found

    def _close_later(self, client: ControlClient) -> None:
        # The member moved: calls over the old address end by themselves or break.
        task = asyncio.get_running_loop().create_task(client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _forget(self, kept: set[str]) -> None:
        for name in [name for name in self._clients if name not in kept]:
            await self._clients.pop(name).close()

    async def _ask(self, member: Member, turns: asyncio.Semaphore) -> Peer:
        async with turns:
            begun = time.perf_counter()
            try:
                description = await self._client(member).describe(self._own_address)
            except EdgeRuntimeError as error:
                return Peer(member, None, str(error))
            took = time.perf_counter() - begun
            await asyncio.to_thread(self.members.seen, member.name)
            return Peer(member, description, round_trip_seconds=took)

    async def _follow_hints(self) -> None:
        known = {member.address for member in await asyncio.to_thread(self.members.active)}
        turns = asyncio.Semaphore(_AT_ONCE)
        hints = [address for address in self._hints if address not in known]
        await asyncio.gather(*(self._follow(address, turns) for address in hints))

    async def _follow(self, address: str, turns: asyncio.Semaphore) -> None:
        """See which member is at an address; what it says of itself counts if its certificate says so too."""
        async with turns:
            try:
                async with ControlClient(self.identity, address, timeout=_CALL_SECONDS) as anybody:
                    name = (await anybody.describe()).self.name
                standing = await asyncio.to_thread(self.members.standing, name)
                if standing is not Standing.MEMBER or name == self.identity.name:
                    return
                async with ControlClient(self.identity, address, name, timeout=_CALL_SECONDS) as member:
                    await member.describe(self._own_address)
                await asyncio.to_thread(self.members.seen, name, address)
            except EdgeRuntimeError as error:
                _log.debug("no member answers at %s: %s", address, error)

    async def _learn(self, founder: str, description: wire.DescribeResponse) -> None:
        if len(description.members) > MAX_MEMBERS:
            raise RequestError(f"{founder} lists {len(description.members)} members")
        listed = [(description.self.name, description.self.address)]
        listed += [(member.name, member.address) for member in description.members]
        if description.self.name != founder or self.identity.name not in dict(listed):
            raise RequestError(f"{founder} answered with a list without itself or this device")
        await asyncio.to_thread(self.members.learn, founder, listed)
