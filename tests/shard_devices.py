"""Devices that have shards of the demo model, over gRPC and in this process; what brings shards from them."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from edge_runtime.cluster.manifest import Manifest, Wanted
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_fetch import Patience, ShardFetch
from edge_runtime.cluster.shard_source import GrpcSource, ShardSource, Source, serve_shard
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.error_catalog import answer_to
from edge_runtime.errors import (
    EdgeRuntimeError,
)
from edge_runtime.v1 import cluster_pb2, cluster_pb2_grpc

QUICK = Patience(rounds=3, first_pause_seconds=0.01, longest_pause_seconds=0.05)


class Model(NamedTuple):
    """A model whose shards are fetched."""

    slices: GroupSlices
    manifest: Manifest

    @property
    def contents(self) -> dict[tuple[int, int], bytes]:
        """Bytes of all shards."""
        return {
            (layer, number): self.slices.head_slice(number)
            if layer == self.manifest.shape.n_layers
            else self.slices.group(layer, number)
            for layer, number, _, _ in self.manifest.shards()
        }


EVERYTHING: Wanted = {**dict.fromkeys(range(6), range(2)), 6: range(3)}


def total(model: Model, wanted: Wanted = EVERYTHING) -> int:
    return sum(shard.size for shard in model.manifest.shards(wanted))


class Device(cluster_pb2_grpc.ClusterServicer):  # type: ignore[misc]
    """A device that serves shards over gRPC on loopback.

    Attributes:
        asked: (digest, offset) of each call.
        sent: bytes of each shard that went out.
        cut_after: breaks each call off after so many messages.
        gate: called before each message, in a thread.
    """

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self.asked: list[tuple[bytes, int]] = []
        self.sent: Counter[bytes] = Counter()
        self.cut_after: int | None = None
        self.gate: Callable[[], object] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._channels: list[grpc.Channel] = []
        self._run(self._start())

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        cluster_pb2_grpc.add_ClusterServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def FetchShard(  # noqa: N802 - the service's name
        self, request: cluster_pb2.FetchShardRequest, context: Any
    ) -> AsyncIterator[cluster_pb2.ShardChunk]:
        self.asked.append((request.digest, request.offset))
        left = self.cut_after
        try:
            async for chunk in serve_shard(self.source, request, context):
                if self.gate is not None:
                    await asyncio.to_thread(self.gate)
                if left == 0:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                left = None if left is None else left - 1
                self.sent[request.digest] += len(chunk.content)
                yield chunk
        except EdgeRuntimeError as error:
            answer, _, message = answer_to(error)
            await context.abort(grpc.StatusCode[answer.grpc], message)

    def as_source(self, name: str = "device", call_seconds: float = 30.0) -> GrpcSource:
        """A client of its own."""
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self._channels.append(channel)
        return GrpcSource(name, cluster_pb2_grpc.ClusterStub(channel), call_seconds)

    def stop(self) -> None:
        """Break all calls off."""
        self._run(self._server.stop(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            channel.close()
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Local:
    """A source in this process, that serves and fails as it is told.

    Args:
        chunk: bytes of a piece.
        cuts: for one call after another, bytes after which it breaks off; the rest are whole.
        twist: changes what is sent.
    """

    def __init__(
        self,
        model: Model,
        name: str = "local",
        chunk: int = 50_000,
        cuts: list[int] | None = None,
        twist: Callable[[bytes], bytes] = lambda content: content,
    ) -> None:
        self.name = name
        self._contents = {hashlib.sha256(content).digest(): content for content in model.contents.values()}
        self._chunk, self._cuts, self._twist = chunk, cuts or [], twist
        self.sent: Counter[bytes] = Counter()
        self.calls = 0

    def fetch(self, digest: bytes, offset: int) -> Iterator[bytes]:
        self.calls += 1
        content = self._twist(self._contents[digest])
        end = offset + self._cuts.pop(0) if self._cuts else len(content)
        for start in range(offset, min(end, len(content)), self._chunk):
            piece = content[start : min(start + self._chunk, end)]
            self.sent[digest] += len(piece)
            yield piece
        if end < len(content):
            raise ConnectionResetError("the connection broke")


def bring(
    model: Model, cache: ShardCache, *sources: Source, wanted: Wanted = EVERYTHING
) -> dict[tuple[int, int], bytes]:
    fetch = ShardFetch(model.manifest, wanted, cache, sources, patience=QUICK)
    return {(layer, number): content for layer, number, content in fetch}


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shards")]
