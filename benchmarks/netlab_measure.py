"""What the lab itself costs: ``python -m benchmarks.netlab_measure [--quick]``.

Two hosts, each pinned to a core. Round trips of 1,200-byte datagrams, one at a time and eight at once, over
loopback, the kernel's bridge and the user-space switch; the switch's processor time a packet; how late it
delivers, with idle hosts and with computing ones; the throughput of a TCP stream.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.netlab import Host, LinkModel, Netlab
from benchmarks.report import Report

_HOSTS = [Host("a", core=0), Host("b", core=1)]
_SIZE = 1200
_BURST = 8
_FAR = LinkModel(delay=0.002, jitter=0.0005, seed=1)
_REPOSITORY = Path(__file__).resolve().parents[1]


def _start(lab: Netlab, host: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.netlab_traffic", *map(str, words)]
    process = lab.run(host, command, stdout=subprocess.PIPE, text=True, cwd=_REPOSITORY)
    if words[0] in ("echo", "compute", "stream-in"):
        assert process.stdout is not None
        process.stdout.readline()
    return process


def _result(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a program in a host ended with status {process.returncode}")
    return json.loads(output)


def _microseconds(times: list[float]) -> dict[str, float]:
    ordered = sorted(1e6 * time for time in times)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in shares.items()}


def _busy_cores() -> float:
    """Cores that the rest of the machine keeps busy, over half a second."""

    def idle() -> int:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(fields[4]) + int(fields[5])

    before = idle()
    time.sleep(0.5)
    free = (idle() - before) / os.sysconf("SC_CLK_TCK") / 0.5
    return round(max(0.0, (os.cpu_count() or 1) - free), 2)


def round_trips(lab: Netlab, address: str, count: int) -> dict[str, Any]:
    """Round trips from a to an echo at `address`, and the switch's part in them."""
    lab.switch_report(anew=True)
    single = _result(_start(lab, "a", "ping-pong", address, count, _SIZE))
    one = lab.switch_report(anew=True)
    burst = _result(_start(lab, "a", "exchange", address, count // 8, _BURST, _SIZE))
    many = lab.switch_report(anew=True)
    figures: dict[str, Any] = {"one": _microseconds(single), "eight": _microseconds(burst)}
    if one["packets"]:
        figures["switch_us_per_packet_one"] = round(1e6 * one["cpu_seconds"] / one["packets"], 1)
        figures["switch_us_per_packet_eight"] = round(1e6 * many["cpu_seconds"] / many["packets"], 1)
    if one["lateness"]["packets"]:
        figures["lateness_one"] = one["lateness"]
        figures["lateness_eight"] = many["lateness"]
    return figures


def _throughput(lab: Netlab, octets: int) -> float:
    receiver = _start(lab, "b", "stream-in")
    seconds: float = _result(_start(lab, "a", "stream-out", lab.address("b"), octets))
    receiver.communicate()
    return round(8e-9 * octets / seconds, 2)


def measure(report: Report, name: str, lab: Netlab, count: int, *, computing: bool) -> None:
    """Note the figures of one lab under `name`."""
    busy = _busy_cores()
    _start(lab, "b", "echo")
    computers = [_start(lab, host.name, "compute") for host in _HOSTS] if computing else []
    figures = round_trips(lab, lab.address("b"), count)
    for computer in computers:
        computer.kill()
    if not computing:
        figures["tcp_gbit_per_second"] = _throughput(lab, 20_000_000)
    figures["other_busy_cores_before"] = busy
    report.details[name] = figures
    report.note(f"{name}: {figures}")


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the packets")
    count = 2_000 if parser.parse_args().quick else 20_000
    report = Report("netlab")
    with Netlab(_HOSTS) as lab:
        echo = _start(lab, "a", "echo", 1)
        report.details["loopback"] = round_trips(lab, "127.0.0.1", count)
        report.note(f"loopback: {report.details['loopback']}")
        echo.kill()
        measure(report, "kernel bridge", lab, count, computing=False)
    with Netlab(_HOSTS, switch="user") as lab:
        measure(report, "user space", lab, count, computing=False)
    for name, computing in (("2 ms", False), ("2 ms, computing hosts", True)):
        with Netlab(_HOSTS, link=_FAR) as lab:
            measure(report, name, lab, count // 10, computing=computing)
    bridge, user = (report.details[name]["one"]["p50"] for name in ("kernel bridge", "user space"))
    report.details["added_round_trip_us"] = {
        "kernel bridge": round(bridge - report.details["loopback"]["one"]["p50"], 1),
        "user space": round(user - report.details["loopback"]["one"]["p50"], 1),
    }
    late = statistics.median(
        report.details[name]["lateness_eight"]["p50"] for name in ("2 ms", "2 ms, computing hosts")
    )
    report.at_most("median lateness of a delayed packet, microseconds", 1e6 * late, 100.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
