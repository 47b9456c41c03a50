"""What a device's owner decides about its part in a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TransportKind = Literal["auto", "udp", "grpc"]
Mode = Literal["exact", "relaxed"]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """See the section ``[cluster]`` of the daemon's settings.

    Attributes:
        listen: HOST:PORT of the Cluster service and, the same number, for datagrams.
        address: HOST:PORT told to others; empty: the address that they see, with the port of `listen`.
        peers: HOST:PORT of members to look for.
        lend_bytes: of weights that this device holds for others; 0: it works for nobody.
        memory_bytes: of weights that this device may hold of its own models; 0: no limit.
        threads: that it computes with for others.
        transport: of single tokens; `auto` takes datagrams where they get through.
        mode: for requests that do not say; quality: of relaxed requests that do not say.
        discovery: look for members by mDNS.
    """

    listen: str = "0.0.0.0:8422"
    address: str = ""
    peers: tuple[str, ...] = ()
    lend_bytes: int = 0
    memory_bytes: int = 0
    threads: int = 1
    transport: TransportKind = "auto"
    mode: Mode = "exact"
    quality: float = 0.99
    discovery: bool = False
