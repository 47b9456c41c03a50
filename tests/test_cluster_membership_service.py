"""What the Cluster service answers, measures and hands on to the worker."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from membership_fixture import MODEL, founder, joined, played, stub_of, until

from edge_runtime.cluster.control_channel import open_channel
from edge_runtime.errors import (
    EdgeRuntimeError,
    ModelNotFoundError,
)
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc


@played
async def test_a_description_says_what_the_device_is_and_whom_it_knows(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first, "first") as client:
            found = await client.describe("10.9.8.7:81")
        assert found.self == wire.Member(name="first", address=first.address)
        assert (found.memory_bytes, found.threads, found.temperature, found.battery) == (
            1 << 30,
            2,
            48.5,
            100,
        )
        assert found.machine == os.uname().machine
        assert [(held.model, held.groups, held.head_slices, held.bytes) for held in found.models] == [
            (MODEL, 3, 1, 99)
        ]
        assert list(found.members) == [wire.Member(name="second", address="10.9.8.7:81")]


@played
async def test_a_link_is_measured_in_about_a_second(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first) as client:
            found = await client.measure_link()
            assert 0 < found.round_trip_seconds < 1
            assert found.jitter_seconds >= 0
            assert found.bytes_per_second > 1e6
            assert await client.measure_compute(64, 256, 2, 8) == 3e9
        (probe,) = first.probes
        assert (probe.n_embd, probe.neurons, probe.gate_type, probe.down_type) == (64, 256, 2, 8)


def probe(**fields: int) -> wire.MeasureRequest:
    return wire.MeasureRequest(compute=wire.ComputeProbe(**fields))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (wire.MeasureRequest(), "asks for an echo or"),
        (wire.MeasureRequest(echo=bytes((1 << 20) + 1)), "echo bytes: 1048577"),
        (probe(n_embd=1 << 16, neurons=1 << 16), "n_embd times neurons"),
        (probe(n_embd=1, neurons=1 << 20), "neurons: 1048576"),
        (probe(neurons=1), "n_embd: 0"),
        (probe(n_embd=1, neurons=1, gate_type=256), "gate_type: 256"),
        (probe(n_embd=1, neurons=1, down_type=1 << 31), "down_type"),
    ],
)
def test_measurements_out_of_range_are_refused(
    tmp_path: Path, request_: wire.MeasureRequest, said: str
) -> None:
    async def play() -> None:
        async with founder(tmp_path) as first, open_channel(first.identity, first.address) as channel:
            stream = stub_of(channel).Measure(timeout=5)
            await stream.write(request_)
            with pytest.raises(grpc.aio.AioRpcError, match=said) as refused:
                await stream.read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert first.probes == []

    asyncio.run(asyncio.wait_for(play(), 30))


@played
async def test_a_measurement_that_says_nothing_ends(tmp_path: Path) -> None:
    from edge_runtime.cluster import control_server

    before = control_server.MEASURE_SECONDS
    control_server.MEASURE_SECONDS = 0.1
    try:
        async with founder(tmp_path) as first, open_channel(first.identity, first.address) as channel:
            stream = stub_of(channel).Measure()
            with pytest.raises(grpc.aio.AioRpcError, match="measurements end after"):
                await stream.read()
    finally:
        control_server.MEASURE_SECONDS = before


@played
async def test_work_is_handed_on_with_the_callers_name_and_host(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first) as client, open_channel(second.identity, first.address) as channel:
            request = wire.PrepareRequest(
                manifest=b"{}", layers=[wire.LayerGroups(groups=[3, 1]), wire.LayerGroups()], plan=4
            )
            progress = [each async for each in client.prepare(request)]
            assert [each.ready for each in progress] == [False, True]
            parts = [wire.SidePart(layer=1, content=bytes(8)), wire.SidePart(layer=2, content=bytes(4))]
            sides = wire.PrepareAdaptersRequest(model=MODEL, plan=4, version=1, parts=parts)
            assert await client.prepare_adapters([sides, sides]) == 24
            opened = wire.OpenSessionRequest(model=MODEL, session=1, secret=bytes(32))
            assert await client.open_session(opened) == 4711
            digest = hashlib.sha256(b"shard").digest()
            chunk = await stub_of(channel).FetchShard(wire.FetchShardRequest(digest=digest), timeout=5).read()
            assert (chunk.content, chunk.total_bytes) == (digest, 32)
            stream = stub_of(channel).Compute()
            for step in (1, 2):
                await stream.write(wire.ComputeRequest(step=step, layer=5, n_rows=2, inputs=b"abc"))
                answer = await stream.read()
                assert (answer.step, answer.layer, answer.sums) == (step, 5, b"abc")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        assert {(caller.name, caller.host) for caller in first.worker.callers} == {("second", "127.0.0.1")}
        assert len(first.worker.callers) == 5


@played
async def test_threads_reach_the_same_service(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")

        def fetch() -> bytes:
            with client.sync_channel() as channel:
                stub: Any = cluster_pb2_grpc.ClusterStub(channel)
                request = wire.FetchShardRequest(digest=bytes([1]) * 32)
                return b"".join(chunk.content for chunk in stub.FetchShard(request, timeout=5))

        async with second.client(first, "first") as client:
            assert await asyncio.to_thread(fetch) == bytes([1]) * 32


@played
async def test_errors_of_the_worker_are_told_and_surprises_are_not(tmp_path: Path) -> None:
    async with founder(tmp_path) as first, first.client(first, "first") as client:
        with pytest.raises(ModelNotFoundError, match="no shard of that digest"), client._told():
            await client._stub.FetchShard(wire.FetchShardRequest(digest=bytes(32)), timeout=5).read()
        with pytest.raises(EdgeRuntimeError, match="an internal error") as surprise:
            await client.close_session(1)
        assert "secret" not in str(surprise.value)


def bad_requests() -> list[tuple[str, Any, str]]:
    prepare, fetch, compute = wire.PrepareRequest, wire.FetchShardRequest, wire.ComputeRequest
    opened, layer, empty = wire.OpenSessionRequest, wire.LayerGroups, wire.LayerGroups()
    member, sides, part = wire.Member, wire.PrepareAdaptersRequest, wire.SidePart
    return [
        ("PrepareAdapters", sides(model="A" * 64, version=1), "64 digits in hexadecimal"),
        ("PrepareAdapters", sides(model=MODEL), "version: 0"),
        ("PrepareAdapters", sides(model=MODEL, version=1, parts=[part(layer=1025)]), "layer: 1025"),
        ("Prepare", prepare(), "manifest bytes: 0"),
        ("Prepare", prepare(manifest=bytes((12 << 20) + 1)), "manifest bytes"),
        ("Prepare", prepare(manifest=b"x", layers=[layer(groups=[1, 1])]), "layer 0: one appears twice"),
        ("Prepare", prepare(manifest=b"x", layers=[layer(groups=[1 << 16])]), "groups of layer 0: 65536"),
        ("Prepare", prepare(manifest=b"x", layers=[empty] * 1025), "layers: 1025"),
        ("Prepare", prepare(manifest=b"x", head_slices=[2, 2]), "head_slices: one appears twice"),
        ("Prepare", prepare(manifest=b"x", sources=["h:1"] * 65), "sources: 65"),
        ("Prepare", prepare(manifest=b"x", sources=["file:///etc"]), "no address of a device"),
        ("FetchShard", fetch(digest=bytes(31)), "digest bytes: 31"),
        ("FetchShard", fetch(digest=bytes(32), offset=1 << 63), "offset"),
        ("FetchShard", fetch(digest=bytes(200)), "takes at most 128"),
        ("OpenSession", opened(model="A" * 64, secret=bytes(32)), "64 digits in hexadecimal"),
        ("OpenSession", opened(model=MODEL, secret=bytes(16)), "secret bytes: 16"),
        ("Compute", compute(n_rows=0, inputs=b"x"), "n_rows: 0"),
        ("Compute", compute(n_rows=513, inputs=b"x"), "n_rows: 513"),
        ("Compute", compute(n_rows=1), "inputs bytes: 0"),
        ("Compute", compute(n_rows=1, inputs=b"x", layer=1 << 20), "layer: 1048576"),
        ("Describe", wire.DescribeRequest(caller=member(name="first", address="h" * 2000)), "takes at most"),
        ("Describe", wire.DescribeRequest(caller=member(name="first", address="x:y")), "no address"),
    ]


@pytest.mark.parametrize(("method", "request_", "said"), bad_requests())
def test_fields_out_of_range_never_reach_the_worker(
    tmp_path: Path, method: str, request_: Any, said: str
) -> None:
    async def play() -> None:
        async with founder(tmp_path) as first, open_channel(first.identity, first.address) as channel:
            call: Any
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                if method in ("OpenSession", "Describe"):
                    await getattr(stub_of(channel), method)(request_, timeout=5)
                elif method == "PrepareAdapters":
                    await stub_of(channel).PrepareAdapters(iter([request_]), timeout=5)
                elif method == "Compute":
                    call = stub_of(channel).Compute(timeout=5)
                    await call.write(request_)
                    await call.read()
                else:
                    await getattr(stub_of(channel), method)(request_, timeout=5).read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in (refused.value.details() or "")
            assert [caller for caller in first.worker.callers if method != "Compute"] == []

    asyncio.run(asyncio.wait_for(play(), 30))


@played
async def test_messages_that_are_none_or_too_long_are_refused(tmp_path: Path) -> None:
    async with founder(tmp_path) as first, open_channel(first.identity, first.address) as channel:
        for content, code in (
            (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b"\x98\x06\x01", grpc.StatusCode.INVALID_ARGUMENT),  # field 99
            (bytes(17 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            call = channel.unary_unary("/edge_runtime.v1.Cluster/OpenSession")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(content, timeout=5)
            assert refused.value.code() in (code, grpc.StatusCode.RESOURCE_EXHAUSTED), content[:8]


@played
async def test_a_stream_that_nobody_reads_is_given_up(tmp_path: Path) -> None:
    device = founder(tmp_path)
    device._stall_seconds = 0.3
    async with device as first, open_channel(first.identity, first.address) as channel:
        stream = stub_of(channel).Compute()
        large = wire.ComputeRequest(n_rows=1, inputs=bytes(4 << 20))

        async def write() -> None:
            while True:
                await stream.write(large)

        writing = asyncio.create_task(write())
        await until(lambda: first.worker.ended == 1)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
