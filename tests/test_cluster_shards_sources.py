"""Sources of shards that break off, lie, lack or send nothing; no byte comes twice."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_devices import EVERYTHING, Device, Local, Model, bring, our_threads, total

from edge_runtime.cluster.manifest import build_manifest
from edge_runtime.cluster.shard_cache import ShardCache
from edge_runtime.cluster.shard_fetch import Patience, ShardFetch
from edge_runtime.cluster.shard_source import CHUNK_BYTES, ShardSource
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import (
    DownloadError,
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


@pytest.fixture
def neighbour(tmp_path: Path, model: Model) -> Iterator[Device]:
    """A worker that has the groups of the layers 0 to 2."""
    with ShardCache(tmp_path / "neighbour") as cache:
        own = {layer: EVERYTHING[layer] for layer in range(3)}
        assert len(list(ShardFetch(model.manifest, own, cache, [Local(model)]))) == 6
        with Device(ShardSource(cache)) as device:
            yield device


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
