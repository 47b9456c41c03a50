"""Where other members reach this device."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import TYPE_CHECKING

from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.daemon.config import ClusterConfig

_WILDCARDS = ("0.0.0.0", "::")
# Of a network that exists in documentation alone: connecting a UDP socket sends nothing, and chooses the
# interface that leads out.
_ELSEWHERE = ("192.0.2.1", 9)


def cluster_config() -> ClusterConfig:
    """The section ``[cluster]`` of the settings that a daemon started here has.

    Raises:
        ConfigError: the settings are wrong.
    """
    from edge_runtime.daemon.config_file import load_config

    return load_config(None, os.environ, {}).cluster


def completed(address: str, config: ClusterConfig) -> str:
    """``HOST:PORT`` of what a person wrote, with the port of the settings where there is none.

    Raises:
        RequestError: it is no address.
    """
    from edge_runtime.addresses import join_address
    from edge_runtime.cluster.members import check_address

    host = address.strip()
    bare = host.removeprefix("[").removesuffix("]")
    if _is_ip(bare) or ":" not in host:
        return check_address(join_address(bare, _port(config)))
    return check_address(host)


def addresses_for_guests(config: ClusterConfig) -> list[str]:
    """Addresses under which a device that is invited may reach this one, likeliest first.

    Raises:
        RequestError: there is none, or the port is not known.
    """
    from edge_runtime.addresses import interface_addresses, join_address, split_address

    if config.address:
        return [config.address]
    port = _port(config)
    if split_address(config.listen)[0] not in _WILDCARDS:
        return [config.listen]
    found = interface_addresses()
    if not found:
        raise RequestError(
            "this device has no network address; connect it, or say with --address HOST:PORT where it is "
            "reached"
        )
    outward = _outward_address()
    found.sort(key=lambda each: each != outward)  # stable: the others stay in their order
    return [join_address(each, port) for each in found]


def address_as_guest(config: ClusterConfig) -> str:
    """What this device says of itself when it joins; 0.0.0.0 stands for the address that is seen.

    Raises:
        RequestError: the port is not known.
    """
    _port(config)
    return config.address or config.listen


def _port(config: ClusterConfig) -> int:
    from edge_runtime.addresses import split_address

    port = split_address(config.address or config.listen)[1]
    if port == 0:
        raise RequestError(
            "cluster.listen has the port 0, which means any free one; set a port there, or say with "
            "--address HOST:PORT where this device is reached"
        )
    return port


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _outward_address() -> str:
    """This device's address towards other networks; empty where there are none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:
            return ""
        return str(probe.getsockname()[0])
