"""uvicorn on the daemon's own event loop, without its signal handlers, its log settings and its timer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from edge_runtime.daemon.http_protocol import PatientProtocol
from edge_runtime.errors import ConfigError

_KEEP_ALIVE_SECONDS = 60  # longer than clients keep an idle connection, so that it is they who close it
_HANDSHAKE_SECONDS = 10.0
_MAX_HEAD_BYTES = 16 << 10
_BACKLOG = 128


class HttpServer:
    """Serves an application over HTTP/1.1.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state = ServerState()
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, ssl_context: ssl.SSLContext | None = None) -> int:
        """Listen, on the running event loop.

        Args:
            host: an address or a name of this device.
            port: 0 for any free one.
            ssl_context: certificate and key. Others may be loaded into it later; new connections get those.

        Returns:
            the port.

        Raises:
            ConfigError: the address is in use, or not this device's.
        """
        # Malformed requests are the senders' fault; a log line for each would let strangers fill the disk.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        config = uvicorn.Config(
            self._app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # anybody could write an address into such a header
            server_header=False,
            date_header=False,  # the boundary writes it; uvicorn's own needs a timer
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        )
        config.load()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: PatientProtocol(config=config, server_state=self._state, app_state={}),
                host,
                port,
                ssl=ssl_context,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS if ssl_context else None,
                backlog=_BACKLOG,
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise ConfigError(
                f"cannot listen for HTTP on {host}:{port}: {reason.lower()}; stop what uses that address, or "
                "set server.http to another one"
            ) from error
        bound: int = self._listener.sockets[0].getsockname()[1]
        return bound

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._state.connections)

    async def stop(self, seconds: float = 5.0) -> None:
        """Take no more connections, let running requests finish for so long, close what is left."""
        if self._listener is None:
            return
        self._listener.close()
        for connection in list(self._state.connections):
            with contextlib.suppress(h11.LocalProtocolError):  # a connection that broke already
                connection.shutdown()
        end = asyncio.get_running_loop().time() + seconds
        while self._state.connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self._state.connections):
            connection.transport.abort()
        while self._state.tasks:  # their clients are gone, which ends them at once
            await asyncio.wait(set(self._state.tasks))
        self._listener = None  # its wait_closed would, from Python 3.12 on, wait for unfinished handshakes
