"""Serving shards to others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from shard_devices import Device, Local, Model, bring

from edge_runtime.cluster.manifest import build_manifest
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_source import CHUNK_BYTES, GrpcSource, ShardSource
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import (
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from edge_runtime.v1 import cluster_pb2, cluster_pb2_grpc


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[Model]:
    with GGUFFile(demo_model) as gguf:
        slices = GroupSlices(gguf, read_hyperparameters(gguf), 384)
        yield Model(slices, build_manifest(slices))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    with ShardCache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def coordinator(model: Model) -> Iterator[Device]:
    source = ShardSource()
    source.add_model(model.manifest, model.slices)
    with Device(source) as device:
        yield device


def test_pieces_begin_at_the_offset(model: Model, cache: ShardCache) -> None:
    bring(model, cache, Local(model), wanted={0: [0]})
    own_file = ShardSource()
    own_file.add_model(model.manifest, model.slices)
    content, digest = model.contents[0, 0], model.manifest.groups[0][0]
    for source in (ShardSource(cache), own_file):
        for offset in (0, 1, CHUNK_BYTES, len(content) - 1, len(content)):
            size, pieces = source.open(digest, offset)
            assert (size, b"".join(pieces)) == (len(content), content[offset:])
        for wrong in (-1, len(content) + 1, 1 << 63):
            with pytest.raises(RequestError, match="were asked for"):
                source.open(digest, wrong)


def test_nothing_is_copied_into_a_cache_to_be_served(model: Model, cache: ShardCache) -> None:
    source = ShardSource(cache)
    source.add_model(model.manifest, model.slices)
    _, pieces = source.open(model.manifest.head[0])
    assert b"".join(pieces) == model.contents[6, 0]
    assert cache.used_bytes() == 0


@pytest.mark.parametrize("digest", [b"", b"x" * 31, b"x" * 33])
def test_name_that_is_no_digest_is_refused(digest: bytes) -> None:
    with pytest.raises(RequestError, match="32 bytes"):
        ShardSource().open(digest)


def test_removed_model_is_served_no_longer(model: Model) -> None:
    source = ShardSource()
    source.add_model(model.manifest, model.slices)
    source.remove_model(model.manifest.model)
    source.remove_model(model.manifest.model)
    with pytest.raises(ModelNotFoundError):
        source.open(model.manifest.head[0])


def test_models_that_are_served_are_bounded(model: Model, demo_model: Path) -> None:
    source = ShardSource()
    with GGUFFile(demo_model) as gguf:
        hp = read_hyperparameters(gguf)
        for size in range(32, 17 * 32, 32):
            slices = GroupSlices(gguf, hp, size)
            source.add_model(build_manifest(slices), slices)
        source.add_model(model.manifest, model.slices)  # one of them, once more
        whole = GroupSlices(gguf, hp, 768)
        with pytest.raises(OverloadedError, match="16 models"):
            source.add_model(build_manifest(whole), whole)


def test_errors_of_a_device_keep_their_meaning(model: Model, coordinator: Device) -> None:
    source = coordinator.as_source("pi-2")
    with pytest.raises(ModelNotFoundError, match="pi-2"):
        list(source.fetch(bytes(32), 0))
    with pytest.raises(UnavailableError, match="pi-2: invalid_argument, bytes from"):
        list(source.fetch(model.manifest.head[0], 1 << 40))


def test_first_message_alone_tells_the_size(model: Model, coordinator: Device) -> None:
    digest, size = model.manifest.head[0], len(model.contents[6, 0])
    with grpc.insecure_channel(f"127.0.0.1:{coordinator.port}") as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        chunks = list(stub.FetchShard(cluster_pb2.FetchShardRequest(digest=digest)))
        assert [chunk.total_bytes for chunk in chunks] == [size] + [0] * (len(chunks) - 1)
        assert max(len(chunk.content) for chunk in chunks) == CHUNK_BYTES
        (last,) = stub.FetchShard(cluster_pb2.FetchShardRequest(digest=digest, offset=size))
        assert (last.total_bytes, last.content) == (size, b"")


def test_closed_connection_is_a_clear_error(coordinator: Device) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{coordinator.port}")
    source = GrpcSource("pi-2", cluster_pb2_grpc.ClusterStub(channel))
    channel.close()
    with pytest.raises(UnavailableError, match="pi-2"):
        list(source.fetch(bytes(32), 0))
