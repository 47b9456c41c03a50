"""Addresses of members by mDNS, with the ``discovery`` extra.

Whoever is in the network can announce whatever they like, so what is found is a hint and nothing more: the
certificate of whoever answers at an address decides.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import Any

from edge_runtime.addresses import interface_addresses, join_address
from edge_runtime.cluster.identity import Identity
from edge_runtime.errors import DependencyError

SERVICE_TYPE = "_edgert-cluster._tcp.local."
INSTALL = 'pip install "edge-runtime[discovery]"'
_LOOK_UPS = 32  # at once; announcements beyond are dropped, and come again
_MAX_HOSTS = 8  # of one announcement
_LOOK_UP_MILLISECONDS = 3000

_log = logging.getLogger("edgert.cluster")


class Discovery:
    """Announces this device and looks for other members. Make and use it on one event loop.

    Args:
        identity: this device's.
        port: of its Cluster service.
        found: called on the event loop with HOST:PORT of what announces the same cluster.
        hosts: IP addresses to announce; by default those of all interfaces but loopback.
        interfaces: IP addresses of the interfaces to use; by default all.

    Raises:
        DependencyError: the extra is not installed.
    """

    def __init__(
        self,
        identity: Identity,
        port: int,
        found: Callable[[str], None],
        *,
        hosts: Sequence[str] | None = None,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._library = _zeroconf()
        self._identity = identity
        self._port = port
        self._found = found
        self._hosts = tuple(hosts if hosts is not None else interface_addresses())[:_MAX_HOSTS]
        self._interfaces = list(interfaces) if interfaces is not None else None
        self._zeroconf: Any = None
        self._browser: Any = None
        self._look_ups: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to announce and to look; takes about a second, in which mDNS makes sure of the name.

        Raises:
            OSError: there is no network to do it in.
        """
        interfaces = self._interfaces
        if interfaces is None:
            self._zeroconf = self._library.asyncio.AsyncZeroconf()
        else:
            self._zeroconf = self._library.asyncio.AsyncZeroconf(interfaces=interfaces)
        await self._zeroconf.async_register_service(self._announcement(), allow_name_change=True)
        self._browser = self._library.asyncio.AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change]
        )

    async def stop(self) -> None:
        """Take the announcement back and end."""
        if self._zeroconf is None:
            return
        if self._browser is not None:
            await self._browser.async_cancel()
        for task in list(self._look_ups):
            task.cancel()
        await asyncio.gather(*self._look_ups, return_exceptions=True)
        await self._zeroconf.async_unregister_all_services()
        await self._zeroconf.async_close()
        self._zeroconf = self._browser = None

    def _announcement(self) -> Any:
        name, fingerprint = self._identity.name, self._identity.fingerprint
        return self._library.asyncio.AsyncServiceInfo(
            SERVICE_TYPE,
            # Two clusters in one network may have members of the same name.
            f"{name}-{fingerprint[:8]}.{SERVICE_TYPE}",
            port=self._port,
            parsed_addresses=list(self._hosts),
            properties={"name": name, "authority": fingerprint},
            server=f"{name}-{fingerprint[:8]}.local.",
        )

    def _on_change(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        gone = self._library.ServiceStateChange.Removed
        if state_change is gone or len(self._look_ups) >= _LOOK_UPS:
            return
        task = asyncio.get_running_loop().create_task(self._look_up(zeroconf, name))
        self._look_ups.add(task)
        task.add_done_callback(self._look_ups.discard)

    async def _look_up(self, zeroconf: Any, name: str) -> None:
        try:
            service = self._library.asyncio.AsyncServiceInfo(SERVICE_TYPE, name)
            if not await service.async_request(zeroconf, _LOOK_UP_MILLISECONDS):
                return
            told = service.decoded_properties
            addresses = service.parsed_addresses()
        except (self._library.Error, OSError, ValueError) as error:
            _log.debug("an announcement cannot be read: %s", error)
            return
        if told.get("authority") != self._identity.fingerprint or told.get("name") == self._identity.name:
            return
        for host in addresses[:_MAX_HOSTS]:
            if service.port and not ipaddress.ip_address(host).is_link_local:
                self._found(join_address(host, service.port))


def _zeroconf() -> Any:
    try:
        import zeroconf
        import zeroconf.asyncio
    except ImportError as error:
        raise DependencyError(
            f"finding members by mDNS needs the extra `discovery` ({error}); install it with: {INSTALL}"
        ) from error
    return zeroconf
