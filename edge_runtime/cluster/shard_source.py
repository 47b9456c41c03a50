"""Where shards come from: this device's disk, its own GGUF files, and other devices."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from io import BufferedReader
from typing import Any, Protocol

import grpc

from edge_runtime.cluster.manifest import DIGEST_BYTES, Manifest
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import ModelNotFoundError, OverloadedError, RequestError, UnavailableError
from edge_runtime.v1 import cluster_pb2

CHUNK_BYTES = 256 << 10
CALL_SECONDS = 30.0  # a stream that lasts longer is cut, and the rest asked for anew
_MAX_MODELS = 16


class Source(Protocol):
    """Another device, or anything else that shards can be had from."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def fetch(self, digest: bytes, offset: int) -> Iterator[bytes]:
        """A shard's bytes from an offset on, in pieces.

        Where the iterator has a method ``close``, it may be called from another thread, and the iteration
        ends soon after.

        Raises:
            ModelNotFoundError: it does not have this shard.
            EdgeRuntimeError, OSError: it cannot be reached, or broke off; while iterating, too.
        """
        ...


class ShardSource:
    """The shards that this device can give to others: from its cache, and from its own GGUF files uncopied.

    Every method may be called from any thread.
    """

    def __init__(self, cache: ShardCache | None = None) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._models: dict[str, tuple[Manifest, GroupSlices]] = {}
        self._positions: dict[bytes, tuple[str, int, int]] = {}

    def add_model(self, manifest: Manifest, slices: GroupSlices) -> None:
        """Serve a model's shards from its file, until `remove_model`.

        Raises:
            OverloadedError: too many models are served already.
        """
        with self._lock:
            if manifest.model not in self._models and len(self._models) >= _MAX_MODELS:
                raise OverloadedError(
                    f"shards of {_MAX_MODELS} models are served, which is the most; unload one of them", 1.0
                )
            self._models[manifest.model] = (manifest, slices)
            self._index()

    def remove_model(self, model: str) -> None:
        """Serve it no longer; its file may be closed afterwards. Without effect where it is not served."""
        with self._lock:
            self._models.pop(model, None)
            self._index()

    def _index(self) -> None:
        self._positions = {
            shard.digest: (model, shard.layer, shard.number)
            for model, (manifest, _) in self._models.items()
            for shard in manifest.shards()
        }

    def open(self, digest: bytes, offset: int = 0) -> tuple[int, Iterator[bytes]]:
        """The size of a shard, and its bytes from an offset on in pieces of `CHUNK_BYTES`.

        Raises:
            RequestError: no SHA-256, or an offset behind the shard's end.
            ModelNotFoundError: the shard is not here.
        """
        if len(digest) != DIGEST_BYTES:
            raise RequestError(f"a shard is named by {DIGEST_BYTES} bytes, not {len(digest)}")
        opened = None if self._cache is None else self._cache.open(digest)
        if opened is not None:
            size, file = opened
            try:
                _check_offset(offset, size)
                return size, _FilePieces(file, offset)
            except BaseException:
                file.close()
                raise
        content = self._cut(digest)
        if content is None:
            raise ModelNotFoundError(f"no shard {digest.hex()[:16]} here; ask another member of the cluster")
        _check_offset(offset, len(content))
        starts = range(offset, len(content), CHUNK_BYTES)
        return len(content), (content[start : start + CHUNK_BYTES] for start in starts)

    def _cut(self, digest: bytes) -> bytes | None:
        # Under the lock, so that no file is closed while it is read; some milliseconds at most.
        with self._lock:
            if digest not in self._positions:
                return None
            model, layer, number = self._positions[digest]
            manifest, slices = self._models[model]
            if layer == manifest.shape.n_layers:
                return slices.head_slice(number)
            return slices.group(layer, number)


class _FilePieces:
    """Pieces of an open file, which is closed at the end or by `close`."""

    def __init__(self, file: BufferedReader, offset: int) -> None:
        self._file = file
        file.seek(offset)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = b"" if self._file.closed else self._file.read(CHUNK_BYTES)
        if not piece:
            self._file.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        self._file.close()

    # A call that is cancelled while a thread opens the file has nobody left who could close it.
    __del__ = close


async def serve_shard(
    source: ShardSource, request: cluster_pb2.FetchShardRequest, context: object
) -> AsyncIterator[cluster_pb2.ShardChunk]:
    """What FetchShard answers; the disk is read in a thread.

    Args:
        context: of the call; the caller has been admitted already.

    Raises:
        RequestError, ModelNotFoundError: as `ShardSource.open`.
    """
    size, pieces = await asyncio.to_thread(source.open, request.digest, request.offset)
    try:
        total: int | None = size
        while (piece := await asyncio.to_thread(next, pieces, b"")) or total is not None:
            yield cluster_pb2.ShardChunk(content=piece, total_bytes=total)
            total = None
    finally:
        if isinstance(pieces, _FilePieces):
            pieces.close()


class GrpcSource:
    """Shards of another device.

    Args:
        name: of the device.
        stub: ``ClusterStub`` on a channel of the synchronous API, with this device's credentials.
        call_seconds: a stream that lasts longer is cut.
    """

    def __init__(self, name: str, stub: Any, call_seconds: float = CALL_SECONDS) -> None:
        self._name = name
        self._stub = stub
        self._call_seconds = call_seconds

    @property
    def name(self) -> str:
        """Of the device."""
        return self._name

    def fetch(self, digest: bytes, offset: int) -> Iterator[bytes]:
        """As `Source.fetch`.

        Raises:
            ModelNotFoundError: the device does not have this shard.
            UnavailableError: it cannot be reached, or broke off.
        """
        request = cluster_pb2.FetchShardRequest(digest=digest, offset=offset)
        try:
            call = self._stub.FetchShard(request, timeout=self._call_seconds)
        except ValueError as error:
            raise UnavailableError(f"{self._name}: the connection was closed") from error
        return _GrpcPieces(self._name, call)


class _GrpcPieces:
    def __init__(self, name: str, call: Any) -> None:
        self._name, self._call = name, call

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece: bytes = next(self._call).content
            return piece
        except grpc.RpcError as error:
            code, details = error.code(), error.details() or ""
            if code is grpc.StatusCode.NOT_FOUND:
                raise ModelNotFoundError(f"{self._name} does not have it") from error
            raise UnavailableError(f"{self._name}: {code.name.lower()}, {details[:200]}") from error

    def close(self) -> None:
        """End the call, from any thread."""
        self._call.cancel()


def _check_offset(offset: int, size: int) -> None:
    if not 0 <= offset <= size:
        raise RequestError(f"bytes from {offset} on were asked for; the shard has {size}")
