"""The Cluster service over real sockets: who gets in, and who is put out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from membership_fixture import founder, joined, played, stub_of, until

from edge_runtime.cluster import control_gate
from edge_runtime.cluster.authority import open_authority
from edge_runtime.cluster.control_channel import open_channel, options
from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.identity import Identity, identity_of
from edge_runtime.errors import (
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from edge_runtime.private_authority import new_key
from edge_runtime.v1 import cluster_pb2 as wire


def stranger(identity: Identity, home: Path, name: str) -> Identity:
    """A member's identity that the authority signed, and that nobody has in its table."""
    authority = open_authority(home)
    key = new_key()
    return identity_of(authority.sign_member(key.public_key(), name), key, authority.certificate)


@played
async def test_without_a_certificate_of_the_cluster_no_connection_stands(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, founder(tmp_path / "other") as other:
        ours, theirs = first.identity, other.identity
        forged = replace(theirs, authority=ours.authority)  # trusts the server, shows a foreign certificate
        async with ControlClient(forged, first.address, timeout=3.0) as client:
            with pytest.raises(UnavailableError):
                await client.describe()
        bare = grpc.ssl_channel_credentials(ours.authority)
        async with grpc.aio.secure_channel(first.address, bare, options("member.edgert.internal")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub_of(channel).Describe(wire.DescribeRequest(), timeout=3)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(first.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await stub_of(channel).Describe(wire.DescribeRequest(), timeout=3)


@played
async def test_nobody_answers_in_another_members_name(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        async with ControlClient(first.identity, second.address, "third", timeout=3.0) as client:
            with pytest.raises(UnavailableError, match="another member than expected"):
                await client.describe()
        async with first.client(second) as client:
            assert (await client.describe()).self.name == "second"


@played
async def test_a_call_in_another_members_name_is_refused(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first) as client:
            request = wire.DescribeRequest(caller=wire.Member(name="first", address="10.6.6.6:1"))
            with pytest.raises(RequestError, match="the caller is second by its certificate"):
                await client._call(client._stub.Describe, request)
        assert {member.address for member in first.members.active()} == {first.address, "127.0.0.1:1"}


@played
async def test_a_revoked_member_is_refused_at_once_and_its_streams_end(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first) as client, open_channel(second.identity, first.address) as channel:
            await client.describe()
            stream = stub_of(channel).Compute()
            await stream.write(wire.ComputeRequest(n_rows=1, inputs=b"x", step=7))
            assert (await stream.read()).step == 7
            first.members.revoke("second")
            with pytest.raises(ForbiddenError, match="second is no member any more"):
                await client.describe()
            with pytest.raises(grpc.aio.AioRpcError, match="no member any more") as ended:
                await stream.read()
            assert ended.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await until(lambda: first.worker.ended == 1)


@played
async def test_the_founder_is_asked_for_a_member_that_is_not_known_yet(
    tmp_path: Path,
) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        third = await joined(first, tmp_path / "c", "third")
        assert second.members.find("third") is None
        async with third.client(second, "second") as client:
            assert (await client.describe()).self.name == "second"
        assert second.members.find("third") is not None


@played
async def test_a_name_that_the_founder_does_not_know_is_refused(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        ghost = stranger(first.identity, first.home, "ghost")
        for device in (first, second):
            async with ControlClient(ghost, device.address) as client:
                with pytest.raises(ForbiddenError, match="ghost is no member that this device knows"):
                    await client.describe()
        await first.stop()
        await asyncio.sleep(control_gate._ASK_SECONDS)
        async with ControlClient(ghost, second.address) as client:
            with pytest.raises(UnavailableError, match="cannot ask the founder"):
                await client.describe()


@played
async def test_one_member_cannot_take_all_calls(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        third = await joined(first, tmp_path / "c", "third")
        async with open_channel(second.identity, first.address) as channel:
            streams = [stub_of(channel).Compute() for _ in range(control_gate.CALLS_A_MEMBER)]
            for stream in streams:
                await stream.write(wire.ComputeRequest(n_rows=1, inputs=b"x"))
                await stream.read()
            async with second.client(first) as client:
                with pytest.raises(OverloadedError, match="has 64 calls here already"):
                    await client.describe()
            async with third.client(first) as client:
                await client.describe()
            for stream in streams:
                stream.cancel()
            await until(lambda: first.worker.ended == len(streams))
        async with second.client(first) as client:
            await client.describe()
