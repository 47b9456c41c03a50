"""Fetching shards: over real gRPC, through breaks and lies, and nothing twice on the wire."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cluster.manifest import Manifest, Wanted, build_manifest
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_fetch import Patience, ReadyShard, ShardFetch, by_layer
from edge_runtime.cluster.shard_source import CHUNK_BYTES, GrpcSource, ShardSource, Source, serve_shard
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.error_catalog import answer_to
from edge_runtime.errors import (
    DownloadError,
    EdgeRuntimeError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
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


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[Model]:
    with GGUFFile(demo_model) as gguf:
        slices = GroupSlices(gguf, read_hyperparameters(gguf), 384)
        yield Model(slices, build_manifest(slices))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ShardCache]:
    with ShardCache(tmp_path / "cache") as cache:
        yield cache


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


@pytest.fixture
def coordinator(model: Model) -> Iterator[Device]:
    source = ShardSource()
    source.add_model(model.manifest, model.slices)
    with Device(source) as device:
        yield device


@pytest.fixture
def neighbour(tmp_path: Path, model: Model) -> Iterator[Device]:
    """A worker that has the groups of the layers 0 to 2."""
    with ShardCache(tmp_path / "neighbour") as cache:
        own = {layer: EVERYTHING[layer] for layer in range(3)}
        assert len(list(ShardFetch(model.manifest, own, cache, [Local(model)]))) == 6
        with Device(ShardSource(cache)) as device:
            yield device


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


# --- what arrives -----------------------------------------------------------------------------------


def test_worker_without_a_file_gets_the_models_bytes(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    assert max(len(content) for content in model.contents.values()) > CHUNK_BYTES  # more than one message
    assert bring(model, cache, coordinator.as_source()) == model.contents
    assert sum(coordinator.sent.values()) == total(model)


def test_nothing_is_fetched_a_second_time(model: Model, cache: ShardCache, coordinator: Device) -> None:
    bring(model, cache, coordinator.as_source(), wanted={0: [0, 1], 6: [0]})
    assert len(coordinator.asked) == 3
    with ShardCache(cache.folder) as later:
        assert bring(model, later, coordinator.as_source()) == model.contents
    assert sum(coordinator.sent.values()) == total(model)
    assert len(coordinator.asked) == 15


def test_progress_tells_what_was_here_and_what_came(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    bring(model, cache, coordinator.as_source(), wanted={0: [0]})
    seen: list[tuple[int, int, int]] = []
    fetch = ShardFetch(
        model.manifest,
        EVERYTHING,
        cache,
        [coordinator.as_source()],
        progress=lambda cached, fetched, total: seen.append((cached, fetched, total)),
    )
    assert len(list(fetch)) == 15
    here = total(model, {0: [0]})
    assert seen[-1] == (here, total(model) - here, total(model))
    assert all(cached + fetched <= all_ == total(model) for cached, fetched, all_ in seen)


def test_first_shards_are_ready_while_later_ones_have_not_left(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    seen_first, last = threading.Event(), model.manifest.shard(6, 2).digest

    def hold_the_last_back() -> None:
        if any(digest == last for digest, _ in coordinator.asked):
            assert seen_first.wait(60)

    coordinator.gate = hold_the_last_back
    order = []
    for layer, number, _ in ShardFetch(model.manifest, EVERYTHING, cache, [coordinator.as_source()]):
        seen_first.set()
        order.append((layer, number))
    assert sorted(order) == sorted(model.contents)
    assert order.index((0, 0)) < 8 < order.index((6, 2))


def test_layers_are_handed_on_as_soon_as_they_are_whole(model: Model, cache: ShardCache) -> None:
    wanted = {1: [0, 1], 3: [1], 4: (), 6: [0, 2]}
    handed_on: list[int] = []

    def watched() -> Iterator[ReadyShard]:
        for ready in ShardFetch(model.manifest, wanted, cache, [Local(model)], in_flight=1):
            yield ready
            handed_on.append(ready.layer)

    layers = []
    for layer, contents in by_layer(watched(), wanted):
        assert contents == {number: model.contents[layer, number] for number in wanted[layer]}
        layers.append((layer, len(handed_on)))
    assert layers == [(1, 1), (3, 2), (6, 4)]


# --- sources that fail ------------------------------------------------------------------------------


def test_neighbour_is_asked_before_the_coordinator(
    model: Model, cache: ShardCache, coordinator: Device, neighbour: Device
) -> None:
    assert bring(model, cache, neighbour.as_source(), coordinator.as_source()) == model.contents
    assert set(neighbour.sent) == {digest for row in model.manifest.groups[:3] for digest in row}
    assert not set(neighbour.sent) & set(coordinator.sent)
    assert sum(neighbour.sent.values()) + sum(coordinator.sent.values()) == total(model)


def test_break_is_answered_by_going_on_from_there(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    coordinator.cut_after = 1
    assert bring(model, cache, coordinator.as_source()) == model.contents
    assert {offset for _, offset in coordinator.asked} == {0, CHUNK_BYTES}
    # A message that was sent when the call broke may not have been read any more.
    assert total(model) <= sum(coordinator.sent.values()) <= total(model) + 15 * CHUNK_BYTES


def test_coordinator_goes_on_where_a_neighbour_died(
    model: Model, cache: ShardCache, coordinator: Device, neighbour: Device
) -> None:
    neighbour.cut_after = 1
    wanted = {0: [0]}
    found = bring(model, cache, neighbour.as_source(), coordinator.as_source(), wanted=wanted)
    assert found == {(0, 0): model.contents[0, 0]}
    digest = model.manifest.groups[0][0]
    assert neighbour.asked == [(digest, 0)]
    assert coordinator.asked in ([(digest, CHUNK_BYTES)], [(digest, 0)])


def test_device_that_is_down_costs_a_try_and_no_more(
    model: Model, cache: ShardCache, coordinator: Device, neighbour: Device
) -> None:
    neighbour.stop()
    assert bring(model, cache, neighbour.as_source(), coordinator.as_source()) == model.contents
    assert neighbour.asked == []
    assert sum(coordinator.sent.values()) == total(model)


def test_source_that_fails_is_not_tried_for_each_shard(model: Model, cache: ShardCache) -> None:
    broken = Local(model, "broken", cuts=[0] * 99)
    assert bring(model, cache, broken, Local(model)) == model.contents
    assert broken.calls < 15


def test_device_that_sends_nothing_is_left_alone(
    model: Model, cache: ShardCache, coordinator: Device, neighbour: Device
) -> None:
    ended = threading.Event()
    neighbour.gate = lambda: ended.wait(60)
    silent = neighbour.as_source("silent", call_seconds=0.2)
    try:
        assert bring(model, cache, silent, coordinator.as_source(), wanted={0: [0, 1]}) != {}
    finally:
        ended.set()
    assert sum(coordinator.sent.values()) == total(model, {0: [0, 1]})


def test_neighbour_that_lacks_everything_is_not_asked_for_each_shard(
    demo_model: Path, cache: ShardCache, tmp_path: Path
) -> None:
    with GGUFFile(demo_model) as gguf:
        slices = GroupSlices(gguf, read_hyperparameters(gguf), 32)
        model = Model(slices, build_manifest(slices))
        wanted = dict.fromkeys(range(6), range(24))
        with ShardCache(tmp_path / "empty") as nothing, Device(ShardSource(nothing)) as poor:
            bring(model, cache, poor.as_source(), Local(model), wanted=wanted)
            assert 16 <= len(poor.asked) <= 20  # as many as are in flight may be asked for at once


def test_liar_is_found_out_and_left_out(model: Model, cache: ShardCache) -> None:
    liar = Local(model, "liar", twist=lambda content: b"x" + content[1:])
    assert bring(model, cache, liar, Local(model)) == model.contents
    assert liar.calls <= 4  # what was in flight when it was found out


def test_half_a_lie_is_found_out(model: Model, cache: ShardCache) -> None:
    """The liar breaks off, so that an honest source seems to have ended what does not fit."""
    liar = Local(model, "liar", cuts=[1000] * 99, twist=lambda content: bytes(len(content)))
    honest = Local(model, "honest", cuts=[2000])  # so it is no better than the liar at first
    found = bring(model, cache, liar, honest, wanted={0: [0]})
    assert found == {(0, 0): model.contents[0, 0]}


def test_part_that_the_disk_damaged_is_no_sources_fault(model: Model, cache: ShardCache) -> None:
    digest = model.manifest.groups[0][0]
    (cache.folder / "arriving" / digest.hex()).write_bytes(bytes(1000))
    honest = Local(model)
    assert bring(model, cache, honest, wanted={0: [0]}) == {(0, 0): model.contents[0, 0]}


@pytest.mark.parametrize(
    "twist", [lambda content: content + b"x", lambda content: content * 2], ids=["a byte more", "twice"]
)
def test_source_that_sends_too_much_is_left_out(
    model: Model, cache: ShardCache, twist: Callable[[bytes], bytes]
) -> None:
    liar = Local(model, "liar", chunk=1 << 20, twist=twist)
    assert bring(model, cache, liar, Local(model)) == model.contents
    assert liar.calls <= 4


def test_endless_empty_messages_are_noticed(model: Model, cache: ShardCache) -> None:
    class Empty(Local):
        def fetch(self, digest: bytes, offset: int) -> Iterator[bytes]:
            while True:
                yield b""

    assert bring(model, cache, Empty(model, "empty"), Local(model)) == model.contents


def test_when_nobody_can_help_every_reason_is_told_and_what_came_is_kept(
    model: Model, cache: ShardCache, neighbour: Device
) -> None:
    broken = Local(model, "broken", cuts=[70_000, *[0] * 99])
    with pytest.raises(DownloadError, match=r"layer 5, number 1.*neighbour does not have it.*broken.*kept"):
        bring(model, cache, neighbour.as_source("neighbour"), broken, wanted={5: [1]})
    assert our_threads() == []
    assert cache.used_bytes() == 70_000
    last = Local(model)
    bring(model, cache, last, wanted={5: [1]})
    assert sum(last.sent.values()) == total(model, {5: [1]}) - 70_000


def test_liars_alone_are_not_asked_for_ever(model: Model, cache: ShardCache) -> None:
    liars = [Local(model, f"liar {number}", twist=lambda content: b"x" + content[1:]) for number in range(3)]
    patient = Patience(rounds=100_000, first_pause_seconds=0.01, longest_pause_seconds=0.01)
    with pytest.raises(DownloadError, match="another SHA-256"):
        list(ShardFetch(model.manifest, {0: [0]}, cache, liars, patience=patient))
    assert [liar.calls for liar in liars] == [1, 1, 1]


def test_nobody_to_ask_is_a_clear_error(model: Model, cache: ShardCache) -> None:
    with pytest.raises(DownloadError, match="nobody to ask"):
        bring(model, cache)


def test_disk_without_room_is_noticed_before_anything_is_asked_for(
    model: Model, tmp_path: Path, coordinator: Device
) -> None:
    with ShardCache(tmp_path, limit_bytes=total(model) - 1) as small:
        with pytest.raises(DownloadError, match="fewer neuron groups"):
            bring(model, small, coordinator.as_source())
        assert coordinator.asked == []
    with ShardCache(tmp_path, limit_bytes=total(model)) as enough:
        assert bring(model, enough, coordinator.as_source()) == model.contents


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(0, 400_000), max_size=12), min_size=1, max_size=3),
    chunk=st.integers(10_000, 300_000),
    in_flight=st.integers(1, 4),
)
def test_whatever_breaks_no_byte_comes_twice(
    model: Model, cuts: list[list[int]], chunk: int, in_flight: int
) -> None:
    sources = [Local(model, f"source {at}", chunk, list(cut)) for at, cut in enumerate(cuts)]
    with tempfile.TemporaryDirectory() as folder, ShardCache(Path(folder)) as cache:
        fetch = ShardFetch(
            model.manifest,
            EVERYTHING,
            cache,
            sources,
            in_flight=in_flight,
            patience=Patience(rounds=40, first_pause_seconds=0.0),
        )
        assert {(layer, number): content for layer, number, content in fetch} == model.contents
    sent: Counter[bytes] = Counter()
    for source in sources:
        sent.update(source.sent)
    assert sent == {shard.digest: shard.size for shard in model.manifest.shards()}


# --- several at once, and ends ----------------------------------------------------------------------


def test_two_fetches_at_once_bring_each_shard_once(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    with ShardCache(cache.folder) as other, futures.ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(bring, model, where, coordinator.as_source()) for where in (cache, cache, other)]
        for run in runs:
            assert run.result(60) == model.contents
    assert sum(coordinator.sent.values()) == total(model)
    assert len(coordinator.asked) == 15


def test_second_fetch_takes_over_where_the_first_is_cancelled(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    ended = threading.Event()
    digest = model.manifest.groups[0][0]
    sent_one = threading.Event()

    def stall() -> None:
        if coordinator.sent[digest]:
            sent_one.set()
            ended.wait(60)

    coordinator.gate = stall
    first = ShardFetch(model.manifest, {0: [0]}, cache, [coordinator.as_source(call_seconds=3600)])
    with futures.ThreadPoolExecutor(2) as pool:
        stalled = pool.submit(list, first)
        assert sent_one.wait(60)
        local = Local(model)
        second = pool.submit(bring, model, cache, local, wanted={0: [0]})
        first.cancel()
        with pytest.raises(UnavailableError, match="cancelled"):
            stalled.result(60)
        ended.set()
        assert second.result(60) == {(0, 0): model.contents[0, 0]}
    assert local.sent[digest] <= total(model, {0: [0]})


def test_cancelled_fetch_ends_though_the_device_is_silent(
    model: Model, cache: ShardCache, coordinator: Device
) -> None:
    ended, begun = threading.Event(), threading.Event()

    def stall() -> None:
        begun.set()
        ended.wait(60)

    coordinator.gate = stall
    fetch = ShardFetch(model.manifest, EVERYTHING, cache, [coordinator.as_source(call_seconds=3600)])
    with futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(list, fetch)
        assert begun.wait(60)
        fetch.cancel()
        with pytest.raises(UnavailableError, match="cancelled"):
            run.result(60)
        assert our_threads() == []
        ended.set()
    with pytest.raises(UnavailableError, match="cancelled"):
        list(fetch)


class Silence:
    """A stream that brings nothing until it is closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.closed.wait()
        raise UnavailableError("closed")

    def close(self) -> None:
        self.closed.set()


def test_caller_that_leaves_early_leaves_no_threads_and_no_claims(model: Model, cache: ShardCache) -> None:
    class PartlySilent(Local):
        def fetch(self, digest: bytes, offset: int) -> Iterator[bytes]:
            return super().fetch(digest, offset) if digest == model.manifest.groups[0][0] else Silence()

    shards = iter(ShardFetch(model.manifest, EVERYTHING, cache, [PartlySilent(model)]))
    assert next(shards)[:2] == (0, 0)
    shards.close()  # type: ignore[attr-defined]
    assert our_threads() == []
    (claims,) = (cache.folder / "claims").iterdir()
    assert claims.stat().st_size == 0


def test_shards_of_a_running_fetch_are_claimed(model: Model, cache: ShardCache) -> None:
    shards = iter(ShardFetch(model.manifest, EVERYTHING, cache, [Local(model)]))
    next(shards)
    (claims,) = (cache.folder / "claims").iterdir()
    assert claims.stat().st_size == 15 * 40
    assert len(list(shards)) == 14


# --- serving ----------------------------------------------------------------------------------------


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
