"""How much of this machine programs took that are no part of a benchmark."""

from __future__ import annotations

import contextlib
import time

import psutil


class OtherPrograms:
    """Counts from its making on; the benchmark's own are this process and all that it started."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        """Cores that other programs kept busy until now, on average."""
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(others, 0.0) / (time.monotonic() - self._began)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own_seconds() -> float:
    me = psutil.Process()
    ended = me.cpu_times()
    total = ended.children_user + ended.children_system
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return float(total)
