"""This device as a worker: fetches, holds and computes neuron groups for other members."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from edge_runtime.cluster.background import in_background
from edge_runtime.cluster.control_channel import open_sync_channel
from edge_runtime.cluster.control_gate import Caller
from edge_runtime.cluster.control_server import WorkedModel
from edge_runtime.cluster.exchange import Floats, Inputs, RefusalReason, RefusedError
from edge_runtime.cluster.grpc_worker import serve_compute
from edge_runtime.cluster.held_shares import HeldShares
from edge_runtime.cluster.identity import Identity
from edge_runtime.cluster.manifest import Manifest, Wanted, parse_manifest
from edge_runtime.cluster.members import Members
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_fetch import ShardFetch
from edge_runtime.cluster.shard_source import GrpcSource, ShardSource, Source, serve_shard
from edge_runtime.cluster.side_parts import SideParts
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.share_speed import measure_share
from edge_runtime.errors import OutOfMemoryError, OverloadedError, RequestError
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

_log = logging.getLogger("edgert.cluster")

_MAX_SESSIONS = 64
# Of one coordinator with one model, which needs two while it changes members; the oldest of more are left
# from when it ended without a word.
_MAX_ALIKE = 8
_MAX_MODELS = 8
_PROGRESS_SECONDS = 0.1
# Of the memory that is lent for weights, so much may be taken beside it for adapters: two versions of a LoRA
# of rank 16 on all matrices of a 4-bit FFN take an eighth of what that takes.
_ADAPTERS_SHARE = 0.125


@dataclass(slots=True, eq=False)
class _Worked:
    """A model of one coordinator."""

    manifest: Manifest
    held: HeldShares
    loading: asyncio.Lock
    used: float = field(default_factory=time.monotonic)


class Worker:
    """Implements `control_server.WorkerService`. Make and use it on the daemon's event loop.

    Args:
        identity, members: of this device and its cluster.
        cache: where fetched shards are kept.
        source: what this device can give to others.
        memory_bytes: of weights that it lends; 0: it works for nobody.
        threads: that it computes with.
        host: address to take datagrams at.
        port: for datagrams; 0 for any free one.
    """

    def __init__(
        self,
        identity: Identity,
        members: Members,
        cache: ShardCache,
        source: ShardSource,
        *,
        memory_bytes: int,
        threads: int,
        host: str,
        port: int = 0,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.threads = threads
        self._identity = identity
        self._members = members
        self._cache = cache
        self._source = source
        self._backend = Backend(threads)
        self._models: dict[tuple[str, str], _Worked] = {}
        self._of_session: dict[int, tuple[str, str]] = {}
        self._udp = UdpWorker(host, port, self._compute)

    # --- preparing ----------------------------------------------------------------------------

    async def prepare(
        self, caller: Caller, request: wire.PrepareRequest
    ) -> AsyncIterator[wire.PrepareProgress]:
        """Fetch and load neuron groups; the last message says that they are ready.

        Raises:
            OutOfMemoryError: more than this device lends. RequestError: no sound manifest or groups.
            DownloadError: a shard cannot be had.
        """
        manifest = await asyncio.to_thread(parse_manifest, request.manifest)
        wanted: dict[int, tuple[int, ...]] = {
            layer: tuple(groups.groups) for layer, groups in enumerate(request.layers) if groups.groups
        }
        if request.head_slices:
            wanted[manifest.shape.n_layers] = tuple(request.head_slices)
        needed = sum(shard.size for shard in manifest.shards(wanted))  # checks the numbers, too
        worked = self._model(caller, manifest)
        async with worked.loading:
            worked.used = time.monotonic()
            await self._make_room(worked, request.plan, wanted, needed)
            progress: asyncio.Queue[tuple[int, int, int]] = asyncio.Queue(1)
            task = asyncio.create_task(self._load(caller, worked, request, wanted, progress))
            try:
                while not task.done():
                    await asyncio.wait({task}, timeout=_PROGRESS_SECONDS)
                    while not progress.empty():
                        cached, fetched, total = progress.get_nowait()
                        yield wire.PrepareProgress(
                            cached_bytes=cached, fetched_bytes=fetched, total_bytes=total
                        )
                cached, fetched, total = await task
            finally:
                task.cancel()
        yield wire.PrepareProgress(
            cached_bytes=cached,
            fetched_bytes=fetched,
            total_bytes=total,
            ready=True,
            loaded_bytes=worked.held.counts[2],
        )

    async def prepare_adapters(
        self, caller: Caller, requests: AsyncIterator[wire.PrepareAdaptersRequest]
    ) -> wire.PrepareAdaptersResponse:
        """Load the side paths of a version of the adapters for a plan that is prepared.

        Raises:
            OutOfMemoryError: more than this device lends. RequestError: they do not fit the plan.
        """
        parts: SideParts | None = None
        worked: _Worked | None = None
        async for request in requests:
            if parts is None:
                worked = self._models.get((caller.name, request.model))
                if worked is None:
                    raise RequestError(
                        f"no plan of model {request.model[:12]} is prepared here for {caller.name}"
                    )
                widths = worked.held.widths(request.plan)
                parts = SideParts(request, worked.held.shape, widths, self._room_for_adapters())
            parts.add(request)
        if parts is None or worked is None:
            raise RequestError("a version of the adapters has at least one message")
        matrices, held = parts.matrices(), worked.held
        async with worked.loading:
            worked.used = time.monotonic()
            size = await in_background(partial(held.load_adapters, parts.plan, parts.version, matrices))
        return wire.PrepareAdaptersResponse(loaded_bytes=size)

    def _model(self, caller: Caller, manifest: Manifest) -> _Worked:
        key = (caller.name, manifest.model)
        worked = self._models.get(key)
        if worked is None:
            if len(self._models) >= _MAX_MODELS and not self._drop_idle():
                raise OverloadedError(f"this device works on {len(self._models)} models already", 5.0)
            worked = _Worked(manifest, HeldShares(manifest.shape, self._backend), asyncio.Lock())
            self._models[key] = worked
        return worked

    def _drop_idle(self, but: _Worked | None = None) -> bool:
        """Free the model without sessions that was unused the longest; whether there was one."""
        busy = set(self._of_session.values())
        idle = [key for key, worked in self._models.items() if key not in busy and worked is not but]
        idle = [key for key in idle if not self._models[key].loading.locked()]
        if not idle:
            return False
        unused = min(idle, key=lambda key: self._models[key].used)
        self._udp.post(self._models[unused].held.close)  # by the thread that may be computing with it
        del self._models[unused]
        return True

    async def _make_room(self, worked: _Worked, plan: int, wanted: Wanted, needed: int) -> None:
        if needed > self.memory_bytes:
            raise OutOfMemoryError(
                f"{needed / 1e6:.0f} MB of neuron groups were asked for; this device lends "
                f"{self.memory_bytes / 1e6:.0f} MB: set [cluster] lend_memory_mb higher, or add a device"
            )
        missing = worked.held.missing(wanted)
        arriving = sum(shard.size for shard in worked.manifest.shards(missing))
        while self._held_bytes() + arriving > self.memory_bytes and self._drop_idle(worked):
            pass
        if self._held_bytes() + arriving > self.memory_bytes:
            worked.held.release_before(plan)
        others = sum(one.held.counts[2] for one in self._models.values() if one is not worked)
        if others + needed > self.memory_bytes:
            raise OutOfMemoryError(
                f"{needed / 1e6:.0f} MB of neuron groups were asked for; this device lends "
                f"{self.memory_bytes / 1e6:.0f} MB, of which {others / 1e6:.0f} MB serve others"
            )

    def _room_for_adapters(self) -> int:
        """Bytes of side paths that may still come: plans often leave nothing of what is lent for weights."""
        held = sum(worked.held.side_bytes for worked in self._models.values())
        return (
            int(self.memory_bytes * _ADAPTERS_SHARE) + max(self.memory_bytes - self._held_bytes(), 0) - held
        )

    def _held_bytes(self) -> int:
        return sum(worked.held.counts[2] for worked in self._models.values())

    async def _load(
        self,
        caller: Caller,
        worked: _Worked,
        request: wire.PrepareRequest,
        wanted: Wanted,
        progress: asyncio.Queue[tuple[int, int, int]],
    ) -> tuple[int, int, int]:
        loop = asyncio.get_running_loop()
        latest = (0, 0, 0)

        def offer(counts: tuple[int, int, int]) -> None:
            if progress.full():
                progress.get_nowait()
            progress.put_nowait(counts)

        def report(cached: int, fetched: int, total: int) -> None:
            nonlocal latest
            latest = (cached, fetched, total)
            loop.call_soon_threadsafe(offer, latest)

        missing = worked.held.missing(wanted)

        def load(fetch: ShardFetch) -> None:
            worked.held.load(request.plan, wanted, iter(fetch) if missing else ())

        with self._sources(caller, list(request.sources)) as sources:
            fetch = ShardFetch(worked.manifest, missing, self._cache, sources, progress=report)
            task = asyncio.create_task(in_background(partial(load, fetch)))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                fetch.cancel()
                await asyncio.wait({task})
                raise
        return latest

    @contextmanager
    def _sources(self, caller: Caller, addresses: list[str]) -> Iterator[list[Source]]:
        """Those that the caller names, and the caller itself last."""
        coordinator = self._members.find(caller.name)
        if coordinator is None:
            raise RequestError(f"{caller.name} is not among the members that this device knows")
        with ExitStack() as stack:
            sources: list[Source] = []
            for address in dict.fromkeys([*addresses, coordinator.address]):
                name = caller.name if address == coordinator.address else None
                channel = stack.enter_context(open_sync_channel(self._identity, address, name))
                sources.append(GrpcSource(address, cluster_pb2_grpc.ClusterStub(channel)))
            yield sources

    def fetch_shard(self, caller: Caller, request: wire.FetchShardRequest) -> AsyncIterator[wire.ShardChunk]:
        """A shard's bytes."""
        return serve_shard(self._source, request, None)

    # --- sessions -----------------------------------------------------------------------------

    async def open_session(
        self, caller: Caller, request: wire.OpenSessionRequest
    ) -> wire.OpenSessionResponse:
        """Agree on a key for datagrams. What is to be computed may be prepared before or after.

        Raises:
            RequestError: the session's number is taken.
        """
        alike = [n for n, key in self._of_session.items() if key == (caller.name, request.model)]
        for forgotten in alike[: 1 - _MAX_ALIKE]:
            self._end_session(forgotten)
        if request.session in self._of_session or len(self._of_session) >= _MAX_SESSIONS:
            raise RequestError(
                f"session {request.session} is taken, or all {_MAX_SESSIONS} are: choose another"
            )
        self._udp.add_session(request.session, request.secret, caller.name)
        self._of_session[request.session] = (caller.name, request.model)
        return wire.OpenSessionResponse(datagram_port=self._udp.port)

    async def close_session(
        self, caller: Caller, request: wire.CloseSessionRequest
    ) -> wire.CloseSessionResponse:
        """End a session of this caller; without effect where there is none."""
        key = self._of_session.get(request.session)
        if key is not None and key[0] == caller.name:
            self._end_session(request.session)
        return wire.CloseSessionResponse()

    def _end_session(self, session: int) -> None:
        self._udp.remove_session(session)
        del self._of_session[session]

    def compute(
        self, caller: Caller, requests: AsyncIterator[wire.ComputeRequest]
    ) -> AsyncIterator[wire.ComputeResponse]:
        """Contributions, for as long as the stream lasts."""
        return serve_compute(self._udp, self._own(caller, requests))

    async def _own(
        self, caller: Caller, requests: AsyncIterator[wire.ComputeRequest]
    ) -> AsyncIterator[wire.ComputeRequest]:
        async for request in requests:
            if self._of_session.get(request.session, ("", ""))[0] != caller.name:
                raise RequestError(f"session {request.session} is not one of {caller.name}'s")
            yield request

    def _compute(self, session: int, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        worked = self._models.get(self._of_session.get(session, ("", "")))
        if worked is None:
            raise RefusedError(RefusalReason.PLAN)
        return worked.held.compute(plan, layer, n_rows, inputs)

    # --- what it is ---------------------------------------------------------------------------

    def models(self) -> list[WorkedModel]:
        """What it holds for others."""
        return [WorkedModel(model, *worked.held.counts) for (_, model), worked in self._models.items()]

    async def measure_compute(self, probe: wire.ComputeProbe) -> float:
        """Bytes of weights per second that a share of this shape gets, on the thread that computes."""
        return await asyncio.wrap_future(self._udp.post(lambda: self._measure(probe)))

    def _measure(self, probe: wire.ComputeProbe) -> float:
        types = ((probe.gate_type, probe.gate_type, probe.down_type),)
        shape = PartitionShape(
            "probe", probe.n_embd, probe.neurons, 1, 1, probe.neurons, types, probe.gate_type
        )
        return measure_share(shape, self._backend)

    async def close(self) -> None:
        """End the thread and free everything; safe to call twice."""
        await asyncio.to_thread(self._udp.stop)
        for worked in self._models.values():
            worked.held.close()
        self._models.clear()
        self._backend.close()
