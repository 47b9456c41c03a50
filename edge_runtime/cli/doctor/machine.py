"""Cores, memory, disk, clock and heat."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.cli.doctor.finding import Finding
from edge_runtime.cli.present import size_text

_CPU = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
_PI_THROTTLED = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HOT_CELSIUS = 80  # where a Raspberry Pi begins to slow down
# With these drivers "powersave" is the ordinary governor, which still reaches full speed.
_SELF_SCALING = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")


def machine() -> Iterator[Finding]:
    """Findings about this device."""
    yield _cores()
    yield from _memory()
    yield _disk()
    yield from _governor()
    yield from _heat()
    yield from _huge_pages()


def _cores() -> Finding:
    import psutil

    physical, logical = psutil.cpu_count(logical=False) or 1, psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    found = f"{_cpu_name()}: {physical} physical cores, {logical} logical"
    share = _quota()
    if share is not None and share < min(physical, allowed):
        advice = f"a container limits this process to {share:g} cores: use --threads {max(1, int(share))}"
        return Finding("CPU", f"{found}, {share:g} allowed", "note", advice)
    if allowed < physical:
        return Finding(
            "CPU", f"{found}, {allowed} allowed", "note", "taskset or a container keeps cores away"
        )
    return Finding("CPU", found)


def _cpu_name() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def _quota() -> float | None:
    """Cores that the control group allows, None for no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    try:
        return int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None


def _memory() -> Iterator[Finding]:
    import psutil

    from edge_runtime.model_store.store import ModelStore

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    found = f"{size_text(memory.available)} of {size_text(memory.total)} free, swap {size_text(swap.total)}"
    models = [(model.path.stat().st_size, model.name) for model in ModelStore()]
    largest, name = max(models, default=(0, ""))
    if memory.available < 200e6:
        yield Finding("memory", found, "fault", "end other programs; the demo model alone needs 200 MB")
    elif largest * 1.1 > memory.available:
        advice = (
            f"{name} ({size_text(largest)}) does not fit: run it with --weights mmap, or end other programs"
        )
        yield Finding("memory", found, "note", advice)
    elif memory.total < 4e9 and not swap.total:
        advice = "a gigabyte of swap (or zram) keeps a short peak from ending the program"
        yield Finding("memory", found, "note", advice)
    else:
        yield Finding("memory", found)


def _disk() -> Finding:
    from edge_runtime.model_store.store import ModelStore

    home = ModelStore().home
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    found = f"{size_text(free)} free for models in {home}"
    if not os.access(there, os.W_OK | os.X_OK):
        advice = f"{there} cannot be written by this user: change its owner, or set EDGERT_HOME"
        return Finding("disk", found, "fault", advice)
    if free < 1e9:
        advice = "remove models (edgert models rm), or set EDGERT_HOME to a folder on a larger disk"
        return Finding("disk", found, "fault" if free < 1e8 else "note", advice)
    return Finding("disk", found)


def _governor() -> Iterator[Finding]:
    policies = {
        (_read(folder / "scaling_governor"), _read(folder / "scaling_driver"))
        for folder in _CPU.glob("cpu[0-9]*/cpufreq")
    }
    slow = [
        governor for governor, driver in policies if governor == "powersave" and driver not in _SELF_SCALING
    ]
    if policies:
        found = ", ".join(sorted(governor for governor, _ in policies))
        advice = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Finding("clock governor", found, "note" if slow else "ok", advice if slow else "")


def _heat() -> Iterator[Finding]:
    degrees = [
        int(text) / 1000
        for zone in _THERMAL.glob("thermal_zone*")
        if _is_number(text := _read(zone / "temp"))
    ]
    throttled = _read(_PI_THROTTLED)
    flags = int(throttled, 16) if throttled else 0
    if not degrees and not throttled:
        return
    found = f"{max(degrees):.0f} °C" if degrees else "temperature unknown"
    if flags & 0x1:
        advice = "the power supply is too weak: use the official one and a short cable"
        yield Finding("heat and power", f"{found}, under-voltage now", "note", advice)
    elif flags & 0xE:
        yield Finding(
            "heat and power", f"{found}, slowed down now", "note", "cool the device: a heat sink, a fan"
        )
    elif flags & 0x10000:
        yield Finding(
            "heat and power", f"{found}, under-voltage since start", "note", "use a stronger power supply"
        )
    elif degrees and max(degrees) >= _HOT_CELSIUS:
        yield Finding(
            "heat and power", found, "note", "cool the device: it will slow down, or does so already"
        )
    else:
        yield Finding("heat and power", found)


def _huge_pages() -> Iterator[Finding]:
    setting = _read(_HUGE_PAGES)
    if "[never]" in setting:
        advice = f"weights are read faster with large pages: echo madvise | sudo tee {_HUGE_PAGES}"
        yield Finding("large pages", "switched off", "note", advice)


def _read(path: str | Path) -> str:
    """A small system file's text, empty where there is none."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()
