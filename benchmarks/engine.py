"""Speed and memory of the engine beside llama.cpp: ``python -m benchmarks.engine [--quick]``.

The files have TinyLlama-1.1B's shape and random weights; speed does not depend on the values. Both
sides stay loaded in processes of their own and take turns; each ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks import first_token
from benchmarks.report import Report
from benchmarks.sides import SideName, SideProcess
from models.synthetic import SyntheticModel, write_synthetic_gguf

_CACHE = Path(__file__).parent.parent / ".cache" / "benchmarks"
_TINY_LLAMA = SyntheticModel(
    n_layers=22, n_embd=2048, n_ff=5632, n_head=32, n_head_kv=4, n_vocab=32000, n_ctx=2048
)
_SIDES: tuple[SideName, SideName] = ("ours", "llama.cpp")
# What each quantization must reach of llama.cpp's speed.
_BARS = {"Q4_0": 1.0, "Q4_K_M": 0.97, "Q8_0": 0.97}


def tiny_llama(quantization: str, *, pure: bool = False) -> Path:
    """A random TinyLlama-1.1B-shaped file, made once.

    As llama.cpp's quantizer does it, a Q4_0 file has a Q6_K head; `pure` ones have Q4_0 throughout.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    path = _CACHE / f"tinyllama-{quantization.lower()}{'-pure' if pure else ''}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        write_synthetic_gguf(unfinished, replace(_TINY_LLAMA, quantization=quantization, pure=pure))
        unfinished.rename(path)
    return path


def _take_turns(sides: dict[SideName, SideProcess], command: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, the order changing from round to round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in _SIDES if number % 2 == 0 else _SIDES[::-1]:
            times[name].append(sides[name].ask(command)["seconds"])
    return times


def _speed(times: dict[str, list[float]]) -> float:
    """Our speed as a multiple of llama.cpp's: the median of the rounds' ratios."""
    pairs = zip(times["llama.cpp"], times["ours"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def compare_speed(report: Report, quantization: str, threads: int, rounds: int) -> None:
    """Decode and prefill side by side."""
    path, bar = tiny_llama(quantization), _BARS[quantization]
    sides = {name: SideProcess(name, path, threads=threads) for name in _SIDES}
    try:
        for title, command, turns in (
            ("decode", "decode 24 1", 3 * rounds),  # a second each, so there can be more of them
            ("prefill 128", "prefill 128", rounds),
            ("prefill 512", "prefill 512", rounds),
        ):
            times = _take_turns(sides, command, turns)
            report.details[f"{quantization} {title}, {threads} threads, seconds"] = times
            report.at_least(f"{quantization} {title} at {threads} threads, x llama.cpp", _speed(times), bar)
    finally:
        for side in sides.values():
            side.close()


def compare_sequences(report: Report, threads: int, rounds: int, *, pure: bool) -> None:
    """Four sequences decoded together beside one."""
    path = tiny_llama("Q4_0", pure=pure)
    sides = {name: SideProcess(name, path, threads=threads, n_sequences=4) for name in _SIDES}
    ratios: dict[SideName, list[float]] = {name: [] for name in _SIDES}
    try:
        for _ in range(rounds):
            for name, side in sides.items():
                one = side.ask("decode 16 1")["seconds"]
                ratios[name].append(side.ask("decode 16 4")["seconds"] / one)
    finally:
        for side in sides.values():
            side.close()
    head = "Q4_0 head" if pure else "Q6_K head"
    report.details[f"four sequences beside one, {head}, {threads} threads"] = ratios
    title = f"time of 4 sequences decoded together, {head}, {threads} threads, x one"
    report.at_most(title, statistics.median(ratios["ours"]), 1.85)


def compare_start(report: Report, quantization: str, threads: int, rounds: int) -> None:
    """Peak memory, and the time from starting Python to the first token."""
    path = tiny_llama(quantization)
    peaks = {}
    for name in _SIDES:
        side = SideProcess(name, path, threads=threads)
        side.ask("prefill 512")
        side.ask("decode 8 1")
        peaks[name] = side.ask("memory")["bytes"]
        side.close()
    report.details[f"{quantization} peak bytes"] = peaks
    report.at_most(f"{quantization} peak memory, x llama.cpp", peaks["ours"] / peaks["llama.cpp"], 1.05)
    times: dict[str, list[float]] = {name: [] for name in _SIDES}
    for _ in range(rounds):
        for name in _SIDES:
            times[name].append(first_token.seconds(name, path, threads))
    report.details[f"{quantization} start to first token, seconds"] = times
    ratio = statistics.median(times["ours"]) / statistics.median(times["llama.cpp"])
    report.at_most(f"{quantization} start to first token, x llama.cpp", ratio, 1.2)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Q4_0 only, fewer rounds")
    parser.add_argument("--quantization", nargs="*", default=list(_BARS), choices=list(_BARS))
    options = parser.parse_args()
    rounds = 3 if options.quick else 7
    quantizations = ["Q4_0"] if options.quick else options.quantization
    report = Report("engine")
    for quantization in quantizations:
        for threads in (1, 2):
            report.note(f"{quantization}, {threads} threads")
            compare_speed(report, quantization, threads, rounds)
        compare_start(report, quantization, 2, max(3, rounds // 2))
    for threads in (1, 2):
        for pure in (True, False):
            compare_sequences(report, threads, rounds, pure=pure)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
