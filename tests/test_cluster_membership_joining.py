"""Joining and leaving over real sockets with real certificates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from membership_fixture import MODEL, founder, joined, played, stub_of

from edge_runtime.cluster import joining
from edge_runtime.cluster.control_channel import options
from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.identity import FOUNDER, read_identity
from edge_runtime.cluster.invitation import parse_invitation
from edge_runtime.cluster.joining import join, leave
from edge_runtime.errors import (
    ForbiddenError,
    RequestError,
    UnauthenticatedError,
    UnavailableError,
)
from edge_runtime.private_authority import new_key
from edge_runtime.v1 import cluster_pb2 as wire


@played
async def test_a_device_joins_and_both_know_each_other(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        assert second.identity.name == "second"
        assert not second.identity.is_founder
        assert second.identity.fingerprint == first.identity.fingerprint
        assert [member.name for member in second.members.active()] == ["first", "second"]
        assert [member.name for member in first.members.active()] == ["first", "second"]
        assert first.changes == 1
        async with second, first.client(second, "second") as client:
            found = await client.describe()
            assert found.self.name == "second"


@played
async def test_each_invitation_serves_once_and_a_lost_answer_can_be_asked_for_again(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        text = first.invite()
        made = await join(tmp_path / "b", text, "second", "0.0.0.0:1")
        with pytest.raises(UnauthenticatedError, match="used already, by second"):
            await join(tmp_path / "c", text, "third", "0.0.0.0:1")
        (tmp_path / "b" / "cluster" / "member.pem").unlink()  # as if the power had failed before the answer
        (tmp_path / "b" / "cluster" / "cluster.db").unlink()
        again = await join(tmp_path / "b", text, "second", "0.0.0.0:1")
        assert (again.name, again.key) == (made.name, made.key)
        assert [member.name for member in first.members.active()] == ["first", "second"]


@played
async def test_expired_and_foreign_invitations_are_told_apart(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, founder(tmp_path / "other") as other:
        late = first.invite(valid_seconds=1)
        await asyncio.sleep(1.1)
        with pytest.raises(UnauthenticatedError, match=r"expired \d+ s ago"):
            await join(tmp_path / "b", late, "second", "0.0.0.0:1")
        elsewhere = other.invite(addresses=[first.address])
        with pytest.raises(UnavailableError, match="do not accept each other's certificates"):
            await join(tmp_path / "b", elsewhere, "second", "0.0.0.0:1")
        assert read_identity(tmp_path / "b") is None


@played
async def test_the_next_address_of_an_invitation_is_tried(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, founder(tmp_path / "other") as other:
        text = first.invite(addresses=["127.0.0.1:1", other.address, first.address])
        identity = await join(tmp_path / "b", text, "second", "0.0.0.0:1")
        assert identity.fingerprint == first.identity.fingerprint


@played
async def test_who_is_in_a_cluster_cannot_join_another(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, founder(tmp_path / "other") as other:
        second = await joined(first, tmp_path / "b", "second")
        with pytest.raises(RequestError, match="in a cluster already, as second"):
            await join(second.home, other.invite(), "second", "0.0.0.0:1")
        async with second.client(first) as client:
            with pytest.raises(RequestError, match="second is a member already"):
                await client._call(client._stub.Join, wire.JoinRequest(name="x"))


@played
async def test_an_invitation_opens_nothing_but_join(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        invitation = parse_invitation(first.invite())
        channel = grpc.aio.secure_channel(first.address, invitation.channel_credentials(), options(FOUNDER))
        async with channel:
            for method, request in (
                ("Describe", wire.DescribeRequest()),
                ("Leave", wire.LeaveRequest()),
                ("OpenSession", wire.OpenSessionRequest(model=MODEL, secret=bytes(32))),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="good for joining alone"):
                    await getattr(stub_of(channel), method)(request, timeout=5)
            with pytest.raises(grpc.aio.AioRpcError, match="good for joining alone"):
                await stub_of(channel).FetchShard(wire.FetchShardRequest(digest=bytes(32)), timeout=5).read()
        assert first.worker.callers == []


@played
async def test_only_the_founder_takes_devices_in(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        text = first.invite(addresses=[second.address])
        with pytest.raises(UnavailableError, match="do not accept each other's certificates"):
            await join(tmp_path / "c", text, "third", "0.0.0.0:1")
        invitation = parse_invitation(text)
        async with grpc.aio.secure_channel(
            second.address, invitation.channel_credentials(), options("member.edgert.internal")
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match=f"ask the founder.* first at {first.address}"):
                await stub_of(channel).Join(wire.JoinRequest(name="third"), timeout=5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Not A Name"}, "no name for a device"),
        ({"signing_request": b"nonsense"}, "no PKCS #10 request"),
        ({"signing_request": bytes(5000)}, "has 5000 bytes"),
        ({"signing_request": bytes(9000)}, "this method takes at most 8192"),
        ({"address": ""}, "has 0 characters"),
        ({"address": ":0"}, "no address of a device"),
        ({"address": "nowhere"}, "no address of a device"),
        ({"address": "h" * 400 + ":1"}, "has 402 characters"),
    ],
)
def test_a_wrong_wish_does_not_use_the_invitation_up(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    async def play() -> None:
        async with founder(tmp_path / "a") as first:
            text = first.invite()
            invitation = parse_invitation(text)
            fields = {"name": "second", "address": ":1", "signing_request": b"x", **changes}
            if "signing_request" not in changes:
                key = new_key()
                fields["signing_request"] = joining._request(key, "second", ":1").signing_request
            async with grpc.aio.secure_channel(
                first.address, invitation.channel_credentials(), options(FOUNDER)
            ) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub_of(channel).Join(wire.JoinRequest(**fields), timeout=5)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in (refused.value.details() or "")
            assert (await join(tmp_path / "b", text, "second", ":1")).name == "second"

    asyncio.run(asyncio.wait_for(play(), 30))


@played
async def test_a_device_without_an_address_of_its_own_is_known_by_where_it_calls_from(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        for number, told in enumerate((":71", "0.0.0.0:72", "[::]:73", "10.9.8.7:74")):
            await join(tmp_path / str(number), first.invite(), f"d{number}", told)
        found = {member.name: member.address for member in first.members.active()}
        assert [found[f"d{number}"] for number in range(4)] == [
            "127.0.0.1:71",
            "127.0.0.1:72",
            "127.0.0.1:73",
            "10.9.8.7:74",
        ]


@played
async def test_leaving_takes_the_device_out_on_both_sides(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        identity = second.identity
        assert await leave(second.home) == identity
        assert read_identity(second.home) is None
        assert [member.name for member in first.members.active()] == ["first"]
        async with ControlClient(identity, first.address) as client:
            with pytest.raises(ForbiddenError, match="no member any more"):
                await client.describe()
        with pytest.raises(RequestError, match="in no cluster"):
            await leave(second.home)
        assert (await join(second.home, first.invite(), "second", ":1")).name == "second-2"


@played
async def test_leaving_needs_the_founder_or_force(tmp_path: Path) -> None:
    first = founder(tmp_path / "a")
    async with first:
        second = await joined(first, tmp_path / "b", "second")
        with pytest.raises(ForbiddenError, match=r"second could take nobody in .* --force"):
            await leave(first.home)
    with pytest.raises(UnavailableError, match=r"cannot be told .*--force. leaves all the same"):
        await leave(second.home)
    assert read_identity(second.home) is not None
    assert (await leave(second.home, force=True)) is not None
    (first.home / "cluster" / "member.pem").write_text("damaged")
    assert await leave(first.home, force=True) is None
    assert read_identity(first.home) is None
