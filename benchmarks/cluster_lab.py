"""Devices of a measured cluster: `cluster_node` processes in a netlab's hosts, each pinned to a core."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from benchmarks.netlab import Host, LinkModel, Netlab
from benchmarks.netlab import Switch as Switch
from edge_runtime.cluster.calibration_file import (
    Calibration,
    calibration_path,
    find_calibration,
    save_calibration,
)
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from models.demo.paths import MODEL_PATH

_PORT = 8422
_REPOSITORY = Path(__file__).resolve().parents[1]
_PATIENCE = 300.0


class DeviceError(RuntimeError):
    """A device answered with an error, or not at all."""


class Device:
    """One device of the lab."""

    def __init__(self, name: str, process: subprocess.Popen[str], address: str) -> None:
        self.name = name
        self.process = process
        self.address = address

    def send(self, do: str, **values: Any) -> None:
        """Give a command without waiting for what it gives."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()

    def receive(self, seconds: float = _PATIENCE) -> dict[str, Any]:
        """What the last command gave.

        Raises:
            DeviceError: an error, or nothing in time.
        """
        stream: IO[str] | None = self.process.stdout
        assert stream is not None
        if not select.select([stream], [], [], seconds)[0]:
            raise DeviceError(f"{self.name} said nothing for {seconds:g} s")
        line = stream.readline()
        if not line:
            raise DeviceError(f"{self.name} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DeviceError(f"{self.name}: {answer['error']}")
        return answer

    def do(self, do: str, seconds: float = _PATIENCE, **values: Any) -> dict[str, Any]:
        """Give a command and wait for what it gives."""
        self.send(do, **values)
        return self.receive(seconds)


class ClusterLab:
    """A coordinator and workers, joined to one cluster. A context manager.

    Args:
        folder: for the devices' homes; their shards stay there for the next lab.
        devices: settings of each; the coordinator's come first.
        cores: of each device; None for any.
        program: module of the devices' processes.
        niceness: of these processes; below 0 they run before what else runs on this machine.
    """

    def __init__(
        self,
        folder: Path,
        devices: list[dict[str, Any]],
        *,
        link: LinkModel | None = None,
        cores: list[int | None] | None = None,
        switch: Switch = "auto",
        program: str = "benchmarks.cluster_node",
        niceness: int = 0,
    ) -> None:
        self._program = program
        self._niceness = niceness
        cores = cores or [number % (os.cpu_count() or 1) for number in range(len(devices))]
        names = [chr(ord("a") + number) for number in range(len(devices))]
        hosts = [Host(name, core=core) for name, core in zip(names, cores, strict=True)]
        self.lab = Netlab(hosts, link=link, switch=switch)
        self._folder = folder
        self._settings = dict(zip(names, devices, strict=True))
        self.devices: dict[str, Device] = {}
        try:
            for name in names:
                self.start(name)
            coordinator = self.devices["a"]
            found = coordinator.do("found", name="a", invitations=len(names) - 1)
            for name, invitation in zip(names[1:], found["invitations"], strict=True):
                self.devices[name].do("join", name=name, invitation=invitation)
        except BaseException:
            self.close()
            raise

    def start(self, name: str) -> Device:
        """Start a device's process."""
        address = f"{self.lab.address(name)}:{_PORT}"
        words = [sys.executable, "-m", self._program, self._folder / name, address]
        words += [f"{key}={value}" for key, value in self._settings[name].items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_REPOSITORY)}
        log = (self._folder / f"{name}.log").open("a")
        process = self.lab.run(
            name,
            [str(word) for word in words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=_REPOSITORY,
        )
        log.close()
        os.setpriority(os.PRIO_PROCESS, process.pid, self._niceness)
        self.devices[name] = Device(name, process, address)
        return self.devices[name]

    @property
    def coordinator(self) -> Device:
        """The device that answers."""
        return self.devices["a"]

    def close(self) -> None:
        """End all devices and the lab."""
        for device in self.devices.values():
            device.process.kill()
            device.process.wait()
            for stream in (device.process.stdin, device.process.stdout):
                if stream is not None:
                    stream.close()
        self.lab.close()

    def __enter__(self) -> ClusterLab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def borrow_calibration(path: Path) -> None:
    """Give a model of random weights, whose own perplexity means nothing, the demo model's calibration.

    Its costs are taken over by relative depth (`Response.resampled`); all groups count as equally important.
    """
    if calibration_path(path).exists():
        return
    with GGUFFile(MODEL_PATH) as demo, GGUFFile(path) as gguf:
        known = find_calibration(demo)
        assert known is not None
        slices = GroupSlices(gguf, read_hyperparameters(gguf))
        shape = slices.shape
        response = known.response.resampled(shape.n_layers)
        increases = np.array([rung.increases for rung in response.rungs])
        calibration = Calibration(
            group_size=shape.group_size,
            importance=np.ones((shape.n_layers, shape.n_groups), np.float32),
            means=np.zeros((shape.n_layers, shape.n_groups, shape.n_embd), np.float16),
            fill="zero",
            response=response,
            n_tokens=known.n_tokens,
            perplexity=known.perplexity,
            divergences=increases,
            increases=increases,
        )
        save_calibration(calibration, gguf)
