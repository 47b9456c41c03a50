"""The other members: kept up to date, found again, waited for no longer than a deadline."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from membership_fixture import founder, joined, played

from edge_runtime.cluster.control_client import ControlClient
from edge_runtime.cluster.control_gate import host_of
from edge_runtime.errors import (
    DeadlineError,
    EdgeRuntimeError,
    ForbiddenError,
    RequestError,
    UnavailableError,
)


@played
async def test_a_refresh_brings_members_addresses_and_revocations(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        async with await joined(first, tmp_path / "c", "third") as third:
            for device in (second, third):
                await device.peers.refresh()
            found = await second.peers.refresh()
            assert [(peer.member.name, peer.member.address) for peer in found] == [
                ("first", first.address),
                ("third", third.address),
            ]
            assert all(peer.description is not None and peer.round_trip_seconds > 0 for peer in found)
            assert (await second.peers.client("third").describe()).self.name == "third"
        found = await second.peers.refresh()
        assert [bool(peer.error) for peer in found] == [False, True]
        first.members.revoke("third")
        assert [peer.member.name for peer in await second.peers.refresh()] == ["first"]
        with pytest.raises(RequestError, match="third is no other member"):
            second.peers.client("third")
        first.members.revoke("second")
        with pytest.raises(ForbiddenError, match="second is no member any more"):
            await second.peers.refresh()


@played
async def test_a_member_that_moved_is_found_at_a_hinted_address(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first, await joined(first, tmp_path / "b", "second") as second:
        await second.peers.refresh()
        old = first.address
        await first.stop()
        first.port = 0
        await first.start()
        assert first.address != old
        second.peers.hint(["127.0.0.1:1", first.address])
        found = await second.peers.refresh()
        assert [(peer.member.address, peer.error) for peer in found] == [(first.address, "")]
        with pytest.raises(RequestError, match="no address"):
            second.peers.hint(["nonsense"])


@played
async def test_without_the_founder_members_go_on(tmp_path: Path) -> None:
    first = founder(tmp_path / "a")
    async with first:
        second = await joined(first, tmp_path / "b", "second")
        third = await joined(first, tmp_path / "c", "third")
        await second.start()
        await third.start()
        for device in (second, third, second):
            await device.peers.refresh()
    try:
        found = await second.peers.refresh()
        assert [(peer.member.name, bool(peer.error)) for peer in found] == [("first", True), ("third", False)]
    finally:
        await second.stop()
        await third.stop()


@played
async def test_a_client_connects_again_after_its_member_was_away(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        async with second.client(first, "first") as client:
            await client.describe()
            await first.stop()
            with pytest.raises(UnavailableError):
                await client.describe()
            await first.start()

            async def answers() -> bool:
                try:
                    return (await client.describe()).self.name == "first"
                except EdgeRuntimeError:
                    return False

            while not await answers():
                await asyncio.sleep(0.1)


@played
async def test_a_member_that_hangs_costs_a_deadline_and_no_more(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as first:
        second = await joined(first, tmp_path / "b", "second")
        # The kernel takes the connection, and nobody ever says a word.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            async with ControlClient(second.identity, address, "first", timeout=0.5) as client:
                with pytest.raises((DeadlineError, UnavailableError)):
                    await client.describe()


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "fe80::1%eth0"),
    ],
)
def test_the_host_is_read_out_of_what_grpc_calls_a_peer(peer: str, host: str) -> None:
    assert host_of(peer) == host
    with pytest.raises(RequestError, match="spoken to over IP"):
        host_of("unix:/run/x")
