"""How long planning takes and how good plans are: ``python -m benchmarks.scheduler [--quick]``.

Plans for 64 nodes and 80 layers, and for the clusters that a household has; beside each what a simulation of
virtual nodes says of its prediction.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report
from scheduler.patience import Response, Rung, ladder, lateness
from scheduler.plan import Plan, Worker, make_plan
from scheduler.profiles import DeviceProfile, LinkProfile, ModelProfile
from scheduler.simulator import simulate
from scheduler.timing import Mode

_LARGE = ModelProfile(80, 56, 3_000_000, 50_000_000, 150_000_000, 125, 150_000_000, 8704, 32768, 512, 4096)
_FFN, _HEAD = 3 * 2048 * 5632 * 9 // 16, 32000 * 2048 * 9 // 16
# TinyLlama-1.1B in Q4_0.
_TINY = ModelProfile(22, 22, _FFN // 22, 5_308_416, _HEAD, 25, _HEAD, 2176, 8192, 256, 5120)
_TINY_SPEED = 1.75e10  # bytes a second of one core of the reference machine


def _importance(model: ModelProfile) -> NDArray[np.float64]:
    return np.random.default_rng(0).uniform(size=(model.n_layers, model.n_groups))


def _large_cluster(memory: float) -> tuple[DeviceProfile, list[Worker]]:
    """A coordinator and 63 unequal workers, over links of 0.2 to 8 ms, a third of which lose 5 %."""
    random = np.random.default_rng(1)
    workers = [
        Worker(
            DeviceProfile(f"w{number}", random.uniform(5e9, 3e10), int(random.uniform(0.3, 1.7) * memory)),
            LinkProfile(random.uniform(2e-4, 8e-3), 1e-4, 1e8, float(random.choice([0, 0, 0.05])), 5e-5),
        )
        for number in range(63)
    ]
    return DeviceProfile("c", 2e10, 6_000_000_000, overhead_seconds=5e-5), workers


def _response(n_layers: int) -> Response:
    """A calibration like the demo model's: the first and the last layers cost most when late."""
    depth = (np.arange(n_layers) + 0.5) / n_layers
    edge = np.where((depth < 0.15) | (depth > 0.85), 20.0, 1.0)
    late = 4e-3 / n_layers * edge[:, None] * np.arange(1, 7)[None, :] / 4
    rungs = []
    for syncs in ladder(late, n_layers):
        total = sum(late[layer, by - 1] for layer, by in enumerate(lateness(syncs, n_layers)) if by)
        rungs.append(Rung(syncs, (0.25, 0.5, 0.75, 1.0), (total * 0.3, total * 1.4, total * 12, total * 45)))
    return Response(n_layers, late, np.full(n_layers, 0.06 / n_layers), tuple(rungs))


def _plans(
    model: ModelProfile, coordinator: DeviceProfile, workers: list[Worker], mode: Mode, rounds: int
) -> tuple[Plan, float, float]:
    """The plan, and the median of wall-clock and of CPU seconds that making it takes."""
    importance, response = _importance(model), _response(model.n_layers)
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(model, coordinator, workers, importance, mode=mode, response=response)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return plan, statistics.median(walls), statistics.median(cpus)


def planning_time(report: Report, rounds: int) -> None:
    """64 nodes and 80 layers, with memory enough and with memory that all nodes are needed for."""
    for name, memory in (("roomy", 4e9), ("tight", 4e8)):
        coordinator, workers = _large_cluster(memory)
        for mode in ("exact", "relaxed"):
            plan, wall, cpu = _plans(_LARGE, coordinator, workers, mode, rounds)
            # One thread's own time, which other programs on the machine leave as it is.
            report.at_most(f"seconds of a plan for 64 nodes x 80 layers, memory {name}, {mode}", cpu, 0.2)
            report.details[f"64 nodes, {name}, {mode}"] = {
                "wall": wall,
                "cpu": cpu,
                "seconds_per_token": plan.seconds_per_token,
                "nodes_used": len(plan.nodes_used),
            }


def _tiny_cluster(count: int, loss: float, part: float) -> tuple[DeviceProfile, list[Worker]]:
    """Hosts that may hold a part of the model, over 2 ms each way with half a millisecond of jitter."""
    memory = int(part * _TINY.total_bytes)
    device = DeviceProfile("host", _TINY_SPEED, memory, overhead_seconds=5e-5)
    return device, [Worker(device, LinkProfile(4.2e-3, 7e-4, 1e8, loss, 5e-5))] * count


def predictions(report: Report, tokens: int) -> None:
    """Predicted beside simulated time of a token."""
    worst = 0.0
    for count in (1, 3):
        for loss in (0.0, 0.02, 0.05, 0.1):
            for mode in ("exact", "relaxed"):
                coordinator, workers = _tiny_cluster(count, loss, 0.6)
                plan, wall, _ = _plans(_TINY, coordinator, workers, mode, 1)
                found = simulate(plan, _TINY, coordinator, workers, n_tokens=tokens, mode=mode)
                mean = float(found.seconds.mean())
                worst = max(worst, abs(plan.seconds_per_token / mean - 1))
                report.details[f"{1 + count} hosts, loss {loss:g}, {mode}"] = {
                    "predicted": plan.seconds_per_token,
                    "simulated": mean,
                    "p99": float(np.quantile(found.seconds, 0.99)),
                    "round_trips": plan.round_trips,
                    "planning": wall,
                }
    report.at_most("largest error of a predicted mean, as a share", worst, 0.15)
    coordinator, workers = _tiny_cluster(1, 0.0, 2.0)
    alone, _, _ = _plans(_TINY, coordinator, workers, "exact", 1)
    report.is_true("one host is used where it holds the model and the link is slow", alone.nodes_used == (0,))


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    report = Report("scheduler")
    planning_time(report, 3 if quick else 9)
    predictions(report, 100 if quick else 1000)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
