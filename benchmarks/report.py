"""The form in which every benchmark reports: figures with their bars, and one JSON object at the end."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that was asked for. `bar` is a sentence: ``>= 1.0``, ``<= 1.85``."""

    name: str
    value: float | bool
    bar: str
    holds: bool


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor()


class Report:
    """Collects figures while a benchmark runs and prints them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._started = time.time()
        self._figures: list[Figure] = []
        self.details: dict[str, Any] = {}

    def at_least(self, name: str, value: float, bar: float) -> None:
        """A figure that must reach `bar`."""
        self._add(Figure(name, round(value, 4), f">= {bar:g}", value >= bar))

    def at_most(self, name: str, value: float, bar: float) -> None:
        """A figure that must not exceed `bar`."""
        shown = value if abs(value) < 1e-3 else round(value, 4)
        self._add(Figure(name, shown, f"<= {bar:g}", value <= bar))

    def is_true(self, name: str, value: bool) -> None:
        """A claim that must hold."""
        self._add(Figure(name, value, "true", value))

    def _add(self, figure: Figure) -> None:
        self._figures.append(figure)
        mark = "ok  " if figure.holds else "MISS"
        print(f"{mark} {figure.name}: {figure.value} ({figure.bar})", flush=True)

    def note(self, text: str) -> None:
        """Progress for a person."""
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> int:
        """Print the JSON object; returns the exit status, 0 when every bar holds."""
        memory = psutil.virtual_memory().total
        result = {
            "benchmark": self.name,
            "date": time.strftime("%Y-%m-%d", time.localtime(self._started)),
            "machine": {
                "cpu": _cpu_model(),
                "architecture": platform.machine(),
                "cores": psutil.cpu_count(logical=False),
                "memory_gib": round(memory / 2**30, 1),
            },
            "seconds": round(time.time() - self._started, 1),
            "must_show": [asdict(figure) for figure in self._figures],
            "details": self.details,
        }
        print(json.dumps(result))
        return 0 if all(figure.holds for figure in self._figures) else 1
