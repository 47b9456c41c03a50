"""Time per token of two devices: on a clean network, and on one that delays and loses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import peer_distributed_llama
from benchmarks.cluster_lab import ClusterLab, Device
from benchmarks.netlab import Host, LinkModel, Netlab
from benchmarks.replay import Recording
from benchmarks.report import Report
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions

PROMPT = [5, 6, 7, 8]
DELAY = LinkModel(delay=0.002, jitter=0.0005, seed=1)
LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1)
LIMIT = 0.6  # of the weights that each host may hold

_VARIANTS: dict[str, dict[str, Any]] = {
    "exact over datagrams": {"mode": "exact", "transport": "udp"},
    "exact over gRPC": {"mode": "exact", "transport": "grpc"},
    "relaxed": {"mode": "relaxed", "transport": "udp", "quality": 0.99},
}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds, and how many."""
    found = np.percentile(np.array(seconds) * 1e3, [50, 95, 99]).round(2).tolist()
    return dict(zip(("p50", "p95", "p99"), found, strict=True)) | {"tokens": len(seconds)}


def fresh(folder: Path, name: str) -> Path:
    """A folder for one lab's devices; shards that others fetched are taken along."""
    made = folder / name
    made.mkdir()
    for before in folder.glob("*/?/shards"):
        target = made / before.parent.name / "shards"
        if not target.exists():
            target.parent.mkdir(mode=0o700)
            shutil.copytree(before, target)
    return made


def clean(report: Report, path: Path, folder: Path, *, tokens: int, rounds: int) -> None:
    """Two hosts and a network that promises nothing, beside one host; both processes' turns alternate."""
    size = path.stat().st_size
    with ClusterLab(fresh(folder, "clean"), [{"lend_bytes": 0}, {"lend_bytes": size}]) as lab:
        coordinator = lab.coordinator
        coordinator.do("load_alone", path=str(path))
        found: dict[str, Any] = {}
        for name in ("exact over datagrams", "relaxed"):
            plan = coordinator.do("load", path=str(path), **_VARIANTS[name])
            times: dict[str, list[float]] = {"alone": [], "two": []}
            coordinator.do("generate", prompt=PROMPT, tokens=4)
            for _ in range(rounds):
                for side, values in (("alone", {"alone": True}), ("two", {})):
                    answer = coordinator.do("generate", prompt=PROMPT, tokens=tokens, **values)
                    times[side] += answer["times"]
            after = coordinator.do("report")["report"]
            found[name] = {side: percentiles(of) for side, of in times.items()} | summary(plan, after)
            ratio = median(times["alone"]) / median(times["two"])
            found[name]["ratio"] = round(ratio, 3)
        report.details["clean network"] = found | {"switch": lab.lab.switch_report()["switch"]}
    best = max(of["ratio"] for of in found.values())
    report.at_least("clean network, two hosts, tokens/s beside one host", best, 1.6)
    report.details["two cores of this machine"] = _two_threads(path)


def _two_threads(path: Path) -> dict[str, float]:
    """What the machine itself allows: one process with one thread and with two, and no network."""
    engines = {n: Engine.load(path, EngineOptions(threads=n, context=256)) for n in (1, 2)}
    times: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(4):
            for n, engine in engines.items():
                for position in range(24):
                    started = time.perf_counter()
                    engine.model.forward(Batch([7], [position]))
                    times[n].append(time.perf_counter() - started)
                engine.model.cells.remove(0)
    finally:
        for engine in engines.values():
            engine.close()
    found = {f"{n} threads, ms a token": round(median(of) * 1e3, 2) for n, of in times.items()}
    return found | {"ratio": round(median(times[1]) / median(times[2]), 3)}


def summary(plan: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a plan was and what came of it, in short."""
    layers = after["layers"]
    return {
        "reason": after["reason"],
        "round trips a token": after["round_trips"],
        "syncs": after["syncs"],
        "shares": [round(node["share"], 3) for node in after["nodes"]],
        "groups of each layer": [node_counts(groups) for groups in plan["groups"]],
        "copies": [node["copies"] for node in after["nodes"][1:]],
        "predicted ms": round(after["predicted_seconds"] * 1e3, 2),
        "milliseconds a token": {
            kind: round(sum(layer[f"{kind}_seconds"] for layer in layers) * 1e3, 2)
            for kind in ("compute", "wait", "transfer")
        },
        "resends": sum(node["repeats"] for node in after["nodes"]),
    }


def node_counts(groups: list[list[int]]) -> list[int]:
    """Groups of one layer on each node."""
    return [len(of) for of in groups]


def lossy(report: Report, path: Path, folder: Path, *, tokens: int, rounds: int) -> None:
    """Each host may hold 60 % of the weights; 2 ms each way, 0.5 ms jitter, growing loss, in turn."""
    size = int(path.stat().st_size * LIMIT)
    home = fresh(folder, "lossy")
    runs: dict[tuple[str, float], _Runs] = {}
    with ClusterLab(home, [{"lend_bytes": 0}, {"lend_bytes": size}], link=DELAY) as lab:
        for name, variant in _VARIANTS.items():
            lab.lab.set_all_links(DELAY)
            lab.coordinator.do("load", path=str(path), memory_bytes=size, **variant)
            for turn in range(rounds):
                for loss in LOSSES:
                    lab.lab.set_all_links(replace(DELAY, loss=loss, seed=1 + turn))
                    runs.setdefault((name, loss), _Runs()).add(lab.coordinator, tokens, name == "relaxed")
            for loss in LOSSES:
                run = runs[name, loss]
                print(f"     {name}, {loss:.0%} loss: {percentiles(run.times)}", flush=True)
                if name == "relaxed":
                    run.recording().save(folder / f"outcomes-{loss:g}.npz")
        found = {f"{name}, {loss:.0%} loss": run.summary() for (name, loss), run in runs.items()}
        report.details["lossy network"] = found | {"switch": lab.lab.switch_report()}
    middle = {key: median(run.times) * 1e3 for key, run in runs.items()}
    report.at_most("relaxed at 5 % loss, ms a token", middle["relaxed", 0.05], 114)
    report.at_most(
        "relaxed at 5 % loss, x its own at none", middle["relaxed", 0.05] / middle["relaxed", 0.0], 1.1
    )
    exact = "exact over datagrams"
    report.at_most(
        "exact over datagrams at 5 % loss, x its own at none", middle[exact, 0.05] / middle[exact, 0.0], 1.5
    )


class _Runs:
    """One variant at one loss, over all turns."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._recorded: dict[str, list[Any]] = {}  # by plan
        self._groups: dict[str, list[list[list[int]]]] = {}
        self._last: dict[str, Any] = {}
        self._counts = dict.fromkeys(("on_time", "lost", "recomputed"), 0.0)
        self._late: NDArray[np.float64] = np.zeros(8)
        self._fell_back = 0

    def add(self, coordinator: Device, tokens: int, record: bool) -> None:
        """Plan for the network as it is now, and decode."""
        plan = coordinator.do("replan")
        coordinator.do("generate", prompt=PROMPT, tokens=4)  # its first answers are all verified
        answer = coordinator.do("generate", prompt=PROMPT, tokens=tokens, record=record)
        self.times += answer["times"]
        key = repr(plan["groups"])
        self._groups[key] = plan["groups"]
        self._recorded.setdefault(key, []).extend(answer.get("recorded", []))
        counts = answer["contributions"]
        for name in self._counts:
            self._counts[name] += counts[name]
        self._late += counts["late"]
        self._fell_back += counts["fell_back"]
        self._last = summary(plan, coordinator.do("report")["report"])

    def summary(self) -> dict[str, Any]:
        """Times over all turns, the last plan, and all outcomes."""
        counted = {name: round(count, 1) for name, count in self._counts.items()}
        counted |= {"late": self._late.round(1).tolist(), "turns that fell back": self._fell_back}
        return percentiles(self.times) | self._last | counted

    def recording(self) -> Recording:
        """What happened under the plan that was in force the longest."""
        key = max(self._recorded, key=lambda plan: len(self._recorded[plan]))
        return recording_of(self._recorded[key], self._groups[key])


def recording_of(recorded: list[list[list[int]]], groups: list[list[list[int]]]) -> Recording:
    """What `cluster_node` recorded, as `replay` takes it."""
    n_layers, n_workers = len(groups), len(groups[0]) - 1
    n_fragments = max((n for token in recorded for at, _, _, n, _ in token if at < n_layers), default=1) or 1
    outcomes = np.zeros((len(recorded), n_layers, n_workers * n_fragments), np.int8)
    for number, token in enumerate(recorded):
        for layer, worker, fragment, n, by in token:
            if layer >= n_layers:
                continue
            first = (worker - 1) * n_fragments
            # The rest of a contribution that was computed here; or an answer cut into fewer pieces.
            whole = fragment < 0 or n != n_fragments
            parts = (
                slice(first, first + n_fragments) if whole else slice(first + fragment, first + fragment + 1)
            )
            outcomes[number, layer, parts] = min(by, 127)
    n_groups = sum(map(len, groups[0]))
    shares = np.array([[len(nodes[w]) / n_groups for nodes in groups] for w in range(1, n_workers + 1)])
    return Recording(outcomes, shares)


def too_slow_a_network(report: Report, path: Path, folder: Path) -> None:
    """Without a memory limit one host is faster on this network: the plan must say so and use one."""
    size = path.stat().st_size
    with ClusterLab(fresh(folder, "slow"), [{"lend_bytes": 0}, {"lend_bytes": size}], link=DELAY) as lab:
        plan = lab.coordinator.do("load", path=str(path), mode="exact")["report"]
        report.details["plan without a memory limit"] = plan["reason"]
        used = sum(node["groups"] > 0 for node in plan["nodes"])
        report.is_true("without a memory limit one host is used in this network", used == 1)


def peer(report: Report, *, tokens: int) -> None:
    """The same shape of model spread by distributed-llama, in hosts and networks like ours."""
    try:
        peer_distributed_llama.build()
    except FileNotFoundError as error:
        report.details["distributed-llama"] = f"not measured: {error}"
        return
    hosts = [Host(name, core=core) for core, name in enumerate("ab")]
    networks = {f"2 ms each way, {loss:.0%} loss": replace(DELAY, loss=loss) for loss in LOSSES[:-1]}
    found: dict[str, Any] = {}
    for name, link in {"alone": None, "clean": None, **networks}.items():
        with Netlab(hosts, switch="user" if name in networks else "auto") as lab:

            def begin(lab: Netlab = lab, link: LinkModel | None = link) -> None:
                # The weights went over the network before; only tokens suffer from it.
                if link is not None:
                    lab.set_all_links(link)

            worker = None if name == "alone" else "b"
            milliseconds = peer_distributed_llama.measure(lab, worker=worker, tokens=tokens, when_warm=begin)
        found[name] = percentiles([one / 1e3 for one in milliseconds])
        print(f"     distributed-llama, {name}: {found[name]}", flush=True)
    report.details["distributed-llama"] = found
