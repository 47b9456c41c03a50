"""sd_notify's protocol against a real socket."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.daemon.notify import Notifier

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd's protocol is Linux's")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket and its name as ``NOTIFY_SOCKET`` says it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@edgert-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        listener.settimeout(5)
        yield listener, name


def test_messages_arrive(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.active
    assert notifier.ready("answers with demo\nMAINPID=1")
    assert listener.recv(4096) == b"READY=1\nSTATUS=answers with demo MAINPID=1"
    assert notifier.stopping()
    assert listener.recv(4096) == b"STOPPING=1"
    assert notifier.watchdog()
    assert listener.recv(4096) == b"WATCHDOG=1"
    assert notifier.status("2 requests")
    assert listener.recv(4096) == b"STATUS=2 requests"
    assert notifier.extend(1.5)
    assert listener.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"
    assert notifier.reloading()
    reload = dict(line.split("=") for line in listener.recv(4096).decode().split("\n"))
    assert reload["RELOADING"] == "1"
    assert int(reload["MONOTONIC_USEC"]) > 0


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.active
    assert not notifier.ready()
    assert notifier.watchdog_seconds is None


@pytest.mark.parametrize("address", ["", "@", "relative", "vsock:2:1"])
def test_other_addresses_are_none(address: str) -> None:
    assert not Notifier({"NOTIFY_SOCKET": address}).active


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_a_manager_that_does_not_read_is_no_reason_to_wait(manager: tuple[socket.socket, str]) -> None:
    _, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    began = time.monotonic()
    assert not all(notifier.watchdog() for _ in range(5000))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/notify", **environment}).watchdog_seconds == seconds
