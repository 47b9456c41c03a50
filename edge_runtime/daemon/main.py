"""The daemon as a process: what starts in which order, what signals do, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from edge_runtime import __version__
from edge_runtime.addresses import join_address, split_address
from edge_runtime.daemon import logs, runtime_file
from edge_runtime.daemon.allocator import give_memory_back
from edge_runtime.daemon.auth import Gate
from edge_runtime.daemon.certificates import ServerTLS, check_exposure, tls_files, token_required
from edge_runtime.daemon.cluster import Cluster
from edge_runtime.daemon.config import Config
from edge_runtime.daemon.notify import Notifier
from edge_runtime.daemon.runtime_file import RunningDaemon, RuntimeFile
from edge_runtime.daemon.service import Service
from edge_runtime.daemon.state import STATE_NAME, check_state
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import ConfigError, EdgeRuntimeError

_log = logging.getLogger("edgert.daemon")

_FLUSH_SECONDS = 300.0  # how often it is written down when tokens were used
_BEAT_SECONDS = 5.0
# An engine's thread shows that it is alive after each step. The longest one, a chunk of a prompt on the
# slowest device with the largest model that fits, takes a minute; one that is silent for longer hangs.
_HANGING_SECONDS = 300.0
_SERVER_SECONDS = 2.0  # for connections to end once no request runs


def run(config: Config, home: Path, on_ready: Callable[[RunningDaemon], None] | None = None) -> None:
    """Serve until a signal ends it.

    Args:
        home: folder of state, tokens and models.
        on_ready: called once both servers listen.

    Raises:
        EdgeRuntimeError: it cannot start.
    """
    give_memory_back()
    logs.configure(config.log)
    with runtime_file.claim(home) as claim:
        asyncio.run(_Daemon(config, home, claim, on_ready).serve())


class _Daemon:
    def __init__(
        self,
        config: Config,
        home: Path,
        claim: RuntimeFile,
        on_ready: Callable[[RunningDaemon], None] | None,
    ) -> None:
        check_exposure(config, home)
        check_state(home / STATE_NAME)
        files = tls_files(config, home)
        self._config = config
        self._claim = claim
        self._on_ready = on_ready
        self._tls = ServerTLS(files) if files is not None else None
        self._ca = str(files.ca) if files is not None and files.ca is not None else ""
        self._gate = Gate(TokenStore(home / STATE_NAME), require_token=token_required(config))
        self._cluster = Cluster(config.cluster, home)
        self._service = Service(config, cluster=self._cluster)
        self._notifier = Notifier()
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._announce_stop: Callable[[], None] = lambda: None

    async def serve(self) -> None:
        """Start, serve, end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        async with AsyncExitStack() as stack:
            await self._service.start()
            stack.push_async_callback(self._stop_service)
            http = await stack.enter_async_context(self._http())
            grpc = await stack.enter_async_context(self._grpc())
            running = self._claim.write(
                http=http,
                grpc=grpc,
                version=__version__,
                tls=self._tls is not None,
                ca=self._ca,
                log=self._config.log.file,
                journal=logs.to_journal(sys.stderr, os.environ),
                started=self._service.started,
            )
            # Who joined a cluster while models were loaded found no daemon to tell.
            self._reloading = asyncio.create_task(self._reload_cluster())
            stack.push_async_callback(self._cancel, asyncio.create_task(self._keep_up()))
            self._notifier.ready(f"answers at {http or grpc}")
            _log.info("serving", extra={"http": http, "grpc": grpc, "version": __version__})
            if self._on_ready is not None:
                self._on_ready(running)
            # What has been made until now stays for ever. Out of the collector's sight, it neither slows each
            # collection nor makes the next one wait until garbage amounts to a quarter of it.
            gc.collect()
            gc.freeze()
            await self._ending.wait()
            await self._flush()
            self._notifier.stopping("finishing what runs")
            self._notifier.extend(self._config.server.shutdown_seconds + 10)
            _log.info("stopping", extra={"running": len(self._service.status().requests)})
            self._announce_stop()
            # While the servers still listen: answers reach their clients, and health says that it stops.
            await self._stop_service()
        _log.info("stopped")

    def _end(self) -> None:
        """SIGTERM or SIGINT; the second one does not wait for what runs."""
        if self._ending.is_set():
            self._hurry.set()
        self._ending.set()

    def _reload(self) -> None:
        """SIGHUP: tokens, certificates, adapters and the cluster."""
        self._notifier.reloading()
        certificate = self._tls.reload if self._tls is not None else None
        for what, read_again in (("tokens", self._gate.reload), ("certificate", certificate)):
            if read_again is None:
                continue
            try:
                read_again()
                _log.info("%s reloaded", what)
            except EdgeRuntimeError as error:
                _log.error("%s not reloaded, the old ones stay: %s", what, error)
        self._notifier.ready()
        self._reloading = asyncio.create_task(self._reload_service())

    async def _reload_service(self) -> None:
        try:
            await self._service.refresh_adapters()
        except EdgeRuntimeError as error:
            _log.error("the adapters are not reloaded, the old ones stay: %s", error)
        await self._reload_cluster()

    async def _reload_cluster(self) -> None:
        try:
            await self._service.reload_cluster()
        except EdgeRuntimeError as error:
            _log.error("the cluster is not reloaded: %s", error)

    async def _stop_service(self) -> None:
        stopping = asyncio.create_task(self._service.stop(self._config.server.shutdown_seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([stopping, hurry], return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            self._service.hurry()
        await stopping
        await self._cancel(hurry)

    @staticmethod
    async def _cancel(task: asyncio.Task[object]) -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[str]:
        """The HTTP server; gives HOST:PORT, empty where the settings want none."""
        if not self._config.server.http:
            yield ""
            return
        from edge_runtime.daemon.http_app import build_app
        from edge_runtime.daemon.http_server import HttpServer

        host, port = split_address(self._config.server.http)
        server = HttpServer(build_app(self._service, self._gate))
        bound = await server.start(host, port, self._tls.context if self._tls else None)
        try:
            yield join_address(host, bound)
        finally:
            await server.stop(_SERVER_SECONDS)

    @asynccontextmanager
    async def _grpc(self) -> AsyncIterator[str]:
        """The gRPC server; gives HOST:PORT, empty where the settings want none."""
        if not self._config.server.grpc:
            yield ""
            return
        from edge_runtime.daemon.grpc_server import GrpcServer

        address = self._config.server.grpc
        credentials = self._tls.grpc_credentials() if self._tls else None
        server = GrpcServer(
            self._service, self._gate, address=address, credentials=credentials, shut_down=self._end
        )
        await server.start()
        self._announce_stop = server.announce_stop
        try:
            yield join_address(split_address(address)[0], server.port)
        finally:
            await server.stop(_SERVER_SECONDS)

    async def _keep_up(self) -> None:
        """Signs of life to the service manager, while there is life; now and then what must be written."""
        loop = asyncio.get_running_loop()
        interval = min(self._notifier.watchdog_seconds or _BEAT_SECONDS, _BEAT_SECONDS)
        flush = loop.time() + _FLUSH_SECONDS
        while True:
            silent = self._service.heartbeat
            if silent < _HANGING_SECONDS:
                self._notifier.watchdog()
            else:
                _log.critical("an engine has hung", extra={"seconds": round(silent)})
            if loop.time() > flush:
                flush = loop.time() + _FLUSH_SECONDS
                await self._flush()
            await asyncio.sleep(interval)

    async def _flush(self) -> None:
        try:
            await asyncio.to_thread(self._gate.flush)
        except ConfigError as error:
            _log.error("the state is not written: %s", error)
