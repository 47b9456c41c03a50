"""Devices of a cluster as processes here: the real program, each with a home folder and ports of its own."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from program import REPOSITORY, Outcome, Program, wait_until

from edge_runtime.daemon.runtime_file import RunningDaemon, read


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; held together, so that they differ."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()


class Device(Program):
    """One device.

    Args:
        settings: variables beside those of the ports, such as ``EDGERT_CLUSTER_MEMORY_MB``.
    """

    def __init__(self, folder: Path, name: str, **settings: str) -> None:
        super().__init__(folder / name)
        self.home.mkdir(mode=0o700)
        self.name = name
        self.log = folder / f"{name}.log"
        http, grpc, self.port = free_ports(3)
        self.address = f"127.0.0.1:{self.port}"
        self._settings = {
            "EDGERT_SERVER_HTTP": f"127.0.0.1:{http}",
            "EDGERT_SERVER_GRPC": f"127.0.0.1:{grpc}",
            "EDGERT_CLUSTER_LISTEN": self.address,
            "EDGERT_CLUSTER_THREADS": "1",
            **settings,
        }

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """As of every program, and the device's own settings."""
        return super().environment({**self._settings, **(extra or {})})

    @contextmanager
    def serving(self) -> Iterator[RunningDaemon]:
        """Its daemon, which ends with the block whatever happens in it."""
        with self.log.open("ab") as file:
            process = subprocess.Popen(
                self.command("serve"),
                stdin=subprocess.DEVNULL,
                stderr=file,
                env=self.environment(),
                cwd=REPOSITORY,
            )
        try:

            def listens() -> bool:
                assert process.poll() is None, self.log.read_text()
                return read(self.home) is not None

            wait_until(listens, 60)
            running = read(self.home)
            assert running is not None
            yield running
        finally:
            process.kill()
            process.wait()

    def invitation(self, *options: str) -> str:
        """Of a cluster that this device founds, if need be, under its own name."""
        return self.ok("cluster", "invite", "--name", self.name, *options).out

    def join(self, invitation: str) -> Outcome:
        """Use an invitation."""
        return self("cluster", "join", "-", "--name", self.name, stdin=invitation)

    def ok(self, *arguments: str) -> Outcome:
        """A command that must not fail."""
        done = self(*arguments)
        assert done.code == 0, f"{arguments}: {done.err}\n{self.log.read_text() if self.log.exists() else ''}"
        return done

    def cluster(self) -> Any:
        """What `edgert cluster status --json` says."""
        return self.ok("cluster", "status", "--json").json

    def states(self) -> dict[str, str]:
        """Member -> state."""
        return {member["name"]: member["state"] for member in self.cluster()["members"]}
