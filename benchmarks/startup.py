"""How long the program takes to start: ``edgert --help`` and other commands that load no model.

Whole processes, timed from outside, the median of interleaved runs; a bare Python interpreter is the floor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.report import Report

_PROGRAM = [sys.executable, "-m", "edge_runtime.cli"]
_COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "--help": [*_PROGRAM, "--help"],
    "run --help": [*_PROGRAM, "run", "--help"],
    "models --help": [*_PROGRAM, "models", "--help"],
    "models list": [*_PROGRAM, "models", "list"],
}
_HELP_BAR_MS = 200.0


def _milliseconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - started) * 1e3


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five runs of each, not thirty")
    runs = 5 if parser.parse_args().quick else 30
    report = Report("startup")
    times: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for name, command in _COMMANDS.items():
        _milliseconds(command)  # fills the disk's and Python's caches
        report.note(f"warmed up: {name}")
    for _ in range(runs):
        for name, command in _COMMANDS.items():
            times[name].append(_milliseconds(command))
    for name, values in times.items():
        report.details[name] = {
            "median_ms": round(statistics.median(values), 1),
            "slowest_ms": round(max(values), 1),
        }
    report.at_most("edgert --help, median in ms", statistics.median(times["--help"]), _HELP_BAR_MS)
    report.at_most("edgert run --help, median in ms", statistics.median(times["run --help"]), _HELP_BAR_MS)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
