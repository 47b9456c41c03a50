"""Who runs: claims of real processes, ended in every way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_runtime.daemon import runtime_file
from edge_runtime.daemon.runtime_file import claim, find, read
from edge_runtime.errors import ConfigError

DAEMON = """
import sys, time
from pathlib import Path
from edge_runtime.daemon.runtime_file import claim
with claim(Path(sys.argv[1])) as file:
    if sys.argv[2] == "write":
        file.write(http="127.0.0.1:1234", grpc="127.0.0.1:1235", version="1", log="/log")
    print("claimed", flush=True)
    sys.stdin.read()
"""


@contextmanager
def daemon(home: Path, mode: str = "write") -> Iterator[subprocess.Popen[str]]:
    """A process that claims a home folder until its standard input ends."""
    words = [sys.executable, "-c", DAEMON, str(home), mode]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            process.kill()


def test_a_living_daemon_is_found(tmp_path: Path) -> None:
    with daemon(tmp_path) as process:
        running = read(tmp_path)
        assert running is not None
        assert running.pid == process.pid
        assert (running.http, running.grpc, running.tls, running.log) == (
            "127.0.0.1:1234",
            "127.0.0.1:1235",
            False,
            "/log",
        )
        assert running.url == "http://127.0.0.1:1234"
        assert running.same_machine


def test_the_end_of_a_daemon_removes_the_file(tmp_path: Path) -> None:
    with daemon(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
        assert not (tmp_path / "daemon.json").exists()
        assert read(tmp_path) is None


def test_what_a_killed_daemon_left_is_not_believed(tmp_path: Path) -> None:
    with daemon(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "daemon.json").exists()
    assert read(tmp_path) is None
    with claim(tmp_path):
        assert not (tmp_path / "daemon.json").exists()
        assert read(tmp_path) is None  # it lives, and does not listen yet


def test_a_second_daemon_is_refused_with_the_firsts_number(tmp_path: Path) -> None:
    with daemon(tmp_path) as process, pytest.raises(ConfigError) as caught:
        claim(tmp_path)
    assert f"process {process.pid} and listens on 127.0.0.1:1234" in str(caught.value)


def test_readers_do_not_hinder_a_start(tmp_path: Path) -> None:
    claim(tmp_path).close()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            read(tmp_path)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(50):
            claim(tmp_path).close()
    finally:
        ended.set()
        for reader in readers:
            reader.join()


def test_a_reader_that_holds_the_lock_delays_a_start_and_no_more(tmp_path: Path) -> None:
    claim(tmp_path).close()
    with (tmp_path / "daemon.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        claim(tmp_path).close()
        timer.join()


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    with claim(tmp_path) as file:
        file.write(http="127.0.0.1:1", grpc="", version="1")

        def rewrite() -> None:
            for number in range(300):
                file.write(http="127.0.0.1:1", grpc="", version="1" * (number * 20))

        writer = threading.Thread(target=rewrite)
        writer.start()
        while writer.is_alive():
            assert read(tmp_path) is not None
        writer.join()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"pid": 1}', "\x00"])
def test_a_damaged_file_is_no_daemon(tmp_path: Path, text: str) -> None:
    with claim(tmp_path):
        (tmp_path / "daemon.json").write_text(text)
        assert read(tmp_path) is None


def test_a_newer_daemon_may_say_more(tmp_path: Path) -> None:
    with claim(tmp_path) as file:
        file.write(http="127.0.0.1:1", grpc="", version="1")
        path = tmp_path / "daemon.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
        assert read(tmp_path) is not None


def test_a_child_does_not_end_its_parents_claim(tmp_path: Path) -> None:
    with claim(tmp_path) as file:
        file.write(http="127.0.0.1:1", grpc="", version="1")
        child = os.fork()
        if child == 0:
            file.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert read(tmp_path) is not None


def test_close_twice_is_once(tmp_path: Path) -> None:
    file = claim(tmp_path)
    file.close()
    with claim(tmp_path) as second:
        second.write(http="127.0.0.1:1", grpc="", version="1")
        file.close()
        assert read(tmp_path) is not None


def test_permissions(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    with claim(home) as file:
        file.write(http="127.0.0.1:1", grpc="", version="1")
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE((home / "daemon.json").stat().st_mode) == 0o644


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="EDGERT_HOME"):
        claim(tmp_path / "file" / "home")
    assert read(tmp_path / "file" / "home") is None


def test_every_address_is_reached_through_loopback(tmp_path: Path) -> None:
    with claim(tmp_path) as file:
        running = file.write(http="0.0.0.0:8420", grpc="[::]:8421", version="1", tls=True)
    assert running.url == "https://127.0.0.1:8420"
    assert running.grpc_target == "[::1]:8421"


def test_the_systems_daemon_is_found_where_no_home_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_file, "SYSTEM_HOME", tmp_path / "system")
    with claim(tmp_path / "system") as file:
        file.write(http="127.0.0.1:1", grpc="", version="1")
        assert find(tmp_path / "own") is not None
        monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "own"))
        assert find(tmp_path / "own") is None
