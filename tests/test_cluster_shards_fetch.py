"""Fetching shards over real gRPC: what arrives, several fetches at once, and their ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest
from shard_devices import EVERYTHING, Device, Local, Model, bring, our_threads, total

from edge_runtime.cluster.manifest import build_manifest
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_fetch import ReadyShard, ShardFetch, by_layer
from edge_runtime.cluster.shard_source import CHUNK_BYTES, ShardSource
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import (
    UnavailableError,
)


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
