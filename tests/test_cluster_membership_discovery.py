"""Members found by mDNS, on the loopback interface with real multicast."""

from __future__ import annotations

import asyncio
import builtins
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from membership_fixture import until

from edge_runtime.addresses import interface_addresses, join_address, split_address
from edge_runtime.cluster.authority import found_cluster
from edge_runtime.cluster.discovery import SERVICE_TYPE, Discovery
from edge_runtime.cluster.identity import Identity
from edge_runtime.errors import DependencyError

LOOPBACK = ["127.0.0.1"]


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return found_cluster(tmp_path, "first", "127.0.0.1:1")


def discovery(identity: Identity, port: int, found: Callable[[str], Any]) -> Discovery:
    return Discovery(identity, port, found, hosts=LOOPBACK, interfaces=LOOPBACK)


def test_members_of_one_cluster_find_each_other_and_no_others(identity: Identity) -> None:
    pytest.importorskip("zeroconf", reason="zeroconf comes with the discovery and the dev extra")
    found: dict[str, set[str]] = {"first": set(), "second": set(), "foreign": set()}

    async def play() -> None:
        identities = [
            identity,
            replace(identity, name="second"),
            # Another cluster in the same network, which has a member of the same name.
            replace(identity, fingerprint="00" * 32),
        ]
        devices = [
            discovery(each, 9000 + number, found[name].add)
            for number, (name, each) in enumerate(zip(found, identities, strict=True))
        ]
        try:
            await asyncio.gather(*(device.start() for device in devices))
        except OSError as error:
            pytest.skip(f"no multicast here: {error}")
        try:
            await asyncio.wait_for(until(lambda: bool(found["first"] and found["second"])), 20)
        finally:
            for device in devices:
                await device.stop()

    asyncio.run(play())
    assert found == {"first": {"127.0.0.1:9001"}, "second": {"127.0.0.1:9000"}, "foreign": set()}


def test_announcements_that_are_nonsense_are_passed_over(identity: Identity) -> None:
    pytest.importorskip("zeroconf", reason="zeroconf comes with the discovery and the dev extra")
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

    found: set[str] = set()

    async def play() -> None:
        ours = replace(identity, name="second")
        strange = [
            {b"name": b"\xff\xfe", b"authority": b"\xff"},
            {},
            {b"authority": identity.fingerprint.encode()[:10]},
        ]
        announcer = AsyncZeroconf(interfaces=LOOPBACK)
        looking, sound = discovery(identity, 9000, found.add), discovery(ours, 9001, lambda _: None)
        try:
            for number, properties in enumerate(strange):
                service = AsyncServiceInfo(
                    SERVICE_TYPE,
                    f"strange-{number}.{SERVICE_TYPE}",
                    port=666,
                    parsed_addresses=LOOPBACK,
                    properties=properties,
                    server=f"strange-{number}.local.",
                )
                await announcer.async_register_service(service, cooperating_responders=True)
            await looking.start()
            await sound.start()
            await asyncio.wait_for(until(lambda: bool(found)), 20)
        finally:
            for each in (looking, sound):
                await each.stop()
            await announcer.async_unregister_all_services()
            await announcer.async_close()

    asyncio.run(play())
    assert found == {"127.0.0.1:9001"}


def test_without_the_extra_the_command_that_installs_it_is_said(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "zeroconf":
            raise ModuleNotFoundError("No module named 'zeroconf'")
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(DependencyError, match=r'pip install "edge-runtime\[discovery\]"'):
        discovery(identity, 9000, print)
    assert "zeroconf" not in vars(sys.modules["edge_runtime.cluster.discovery"])


def test_interface_addresses_are_those_that_others_can_reach() -> None:
    for host in interface_addresses():
        assert not host.startswith(("127.", "169.254.", "fe80:"))
        assert split_address(join_address(host, 8422)) == (host, 8422)
