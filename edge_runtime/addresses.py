"""Network addresses as settings and messages carry them: ``HOST:PORT``, IPv6 in brackets."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%a-z]+\]|[^\[\]:\s/]+):(?P<port>[0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Host (without brackets) and port of ``HOST:PORT``.

    Raises:
        ValueError: it is not one.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65535:
        raise ValueError("needed is HOST:PORT, such as 127.0.0.1:8420 or [::1]:8420")
    return found["host"].strip("[]"), int(found["port"])


def join_address(host: str, port: int) -> str:
    """``HOST:PORT`` of a host without brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_addresses() -> list[str]:
    """IP addresses by which other devices in the network may reach this one."""
    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    found = []
    for each in (address for all_ in psutil.net_if_addrs().values() for address in all_):
        if each.family in kinds:
            with suppress(ValueError):
                found.append(ipaddress.ip_address(each.address.partition("%")[0]))
    # Of IPv6 those of the own network: public ones change every day.
    usable = [
        each
        for each in found
        if not (each.is_loopback or each.is_link_local) and (each.version == 4 or each.is_private)
    ]
    return [str(each) for each in sorted(usable, key=lambda each: each.version)]
