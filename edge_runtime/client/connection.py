"""Where a daemon is and how it is spoken to, for both clients."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from edge_runtime.errors import ConfigError, RequestError, UnavailableError

DEFAULT_ADDRESS = "127.0.0.1:8421"

_MAX_RECEIVED_BYTES = 64 << 20  # vectors of many inputs
_MOST_SECONDS = 1e9  # gRPC counts nanoseconds in 64 bits

# Of every channel.
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES),
    ("grpc.enable_http_proxy", 0),  # a daemon is on this device or in this network
    ("grpc.use_local_subchannel_pool", 1),  # closing a client closes its connection
    # A daemon that was restarted is found again within seconds instead of minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A daemon whose device lost power without a word is given up within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a daemon.

    Attributes:
        address: HOST:PORT.
        token: sent with each call; None for none. It is not part of the representation.
        credentials: of TLS; None for none.
        timeout: seconds that a call may take; None for no limit of the client's.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    timeout: float | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def connection(
    address: str,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    tls: bool | None = None,
) -> Connection:
    """Check and gather what a client needs to know.

    Args:
        ca: PEM file of the authority that signed the daemon's certificate.
        tls: whether to use TLS; by default if ``ca`` is given. True without ``ca``: the system's authorities.

    Raises:
        ConfigError: the address, the token or the file is not valid, or a token would travel in the clear.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address; give HOST:PORT, such as {DEFAULT_ADDRESS}")
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("the token is empty or has characters that no token has")
    credentials = None
    if tls or (tls is None and ca is not None):
        credentials = grpc.ssl_channel_credentials(None if ca is None else _certificate(Path(ca)))
    elif token is not None and not _is_loopback(host):
        raise ConfigError(
            f"the token would travel readable to {address}; pass ca= with the daemon's ca.pem, for TLS"
        )
    return Connection(address, token, credentials, timeout)


def local_connection(timeout: float | None = None) -> Connection:
    """The daemon of this user, else the one that the system runs.

    Raises:
        UnavailableError: none runs, or it does not listen for gRPC.
        ConfigError: its token or certificate is not valid.
    """
    from edge_runtime.daemon.runtime_file import SYSTEM_HOME, read
    from edge_runtime.model_store.paths import home

    folders = [home()] if os.environ.get("EDGERT_HOME") else [home(), SYSTEM_HOME]
    for folder in folders:
        running = read(folder)
        if running is None:
            continue
        if not running.grpc:
            raise UnavailableError(
                f"the daemon of {folder} does not listen for gRPC: server.grpc is empty in its settings"
            )
        ca = running.ca or None
        return connection(_reachable(running.grpc), _token(folder), ca, timeout, tls=running.tls)
    raise UnavailableError(f"no daemon runs for {folders[0]}; start one with `edgert serve`")


def seconds_of(timeout: float | None, found: Connection) -> float | None:
    """How long a call may take: what it says itself, else what its client says.

    Raises:
        RequestError: no number of seconds above 0.
    """
    seconds = found.timeout if timeout is None else timeout
    if seconds is not None and not 0 < seconds < _MOST_SECONDS:
        raise RequestError(f"timeout = {seconds}; needed is a number of seconds above 0, or None")
    return seconds


def _token(folder: Path) -> str | None:
    try:
        return (folder / "token").read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None  # there is none, or it is another user's


def _certificate(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give the daemon's ca.pem, which `edgert init` made"
        ) from error
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise ConfigError(
            f"{path} is no certificate in PEM; give the daemon's ca.pem, which `edgert init` made"
        )
    return found


def _reachable(address: str) -> str:
    """Where to call a daemon that listens everywhere."""
    host, _, port = address.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host) + f":{port}"


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
