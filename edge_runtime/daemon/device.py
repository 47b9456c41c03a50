"""How the device is doing: memory, temperature, load."""

from __future__ import annotations

from typing import NamedTuple

import psutil

_PROCESSOR_SENSORS = ("cpu_thermal", "coretemp", "k10temp", "cpu-thermal", "soc_thermal", "zenpower")


class DeviceState(NamedTuple):
    """One reading.

    Attributes:
        memory_bytes: resident memory of this process.
        memory_available_bytes: what the device could still give.
        temperature: of the processor in degrees Celsius; None where the device does not tell.
        cpu_percent: of all cores together, since the last reading.
    """

    memory_bytes: int
    memory_available_bytes: int
    temperature: float | None
    cpu_percent: float


_process = psutil.Process()


def read_device() -> DeviceState:
    """The device at this moment."""
    return DeviceState(
        memory_bytes=int(_process.memory_info().rss),
        memory_available_bytes=int(psutil.virtual_memory().available),
        temperature=_temperature(),
        cpu_percent=float(psutil.cpu_percent()),
    )


def read_strain() -> tuple[float | None, float | None]:
    """Degrees Celsius of the processor, and percent of charge while on battery; None where unknown."""
    read = getattr(psutil, "sensors_battery", None)  # absent on some systems
    battery = read() if read is not None else None
    return _temperature(), None if battery is None or battery.power_plugged else float(battery.percent)


def _temperature() -> float | None:
    read = getattr(psutil, "sensors_temperatures", None)  # absent on some systems
    sensors = read() if read is not None else {}
    for name in (*_PROCESSOR_SENSORS, *sensors):
        if sensors.get(name):
            return float(sensors[name][0].current)
    return None
