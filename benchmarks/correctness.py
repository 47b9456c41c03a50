"""Does the engine compute what llama.cpp computes? Logits, texts and divergences on the same files.

Run as ``python -m benchmarks.correctness [--quick]``. Both sides get the same GGUF file, the same prompts in
batches of the same size, and flash attention. The bars:

- F32 and F16 files: no logit differs by more than 1e-3 of the logits' range, and 64 tokens of greedy text
  are the same.
- Quantized files, and BF16: the Kullback-Leibler divergence of our distribution from llama.cpp's, mean over
  the positions of all prompts, is at most twice that of llama.cpp without flash attention from llama.cpp with
  it. Where attention hardly matters both are rounding noise of F32, so the bar is never below 1e-10: logits
  that differ by a standard deviation s give about s^2 / 2, so that is s = 1.4e-5, some 15 units in the last
  place of a logit of 10.

The matrix crosses architectures, rope scalings, quantizations and odd shapes on random weights; trained
weights are those in ``models/demo`` and ``../shared/data/models``, requantized by llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.correctness_comparison import GREEDY_TOKENS, KL_FLOOR, MAX_DELTA, Case, Outcome, compare
from benchmarks.correctness_random import quick_cases, random_cases
from benchmarks.correctness_trained import DEMO, FILE_TYPES, QUICK_FILE_TYPES, STORIES, stories, trained_cases
from benchmarks.report import Report


def _summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """The worst of each quantization."""
    kinds = dict.fromkeys(outcome.quantization for outcome in outcomes)
    return {
        kind: {
            "cases": len(group),
            "delta": max(outcome.delta for outcome in group),
            "kl": max(outcome.kl for outcome in group),
            "own_kl": max(outcome.own_kl for outcome in group),
            "kl_share_of_bar": max(outcome.kl_share for outcome in group),
            "same_text": sum(same == GREEDY_TOKENS for outcome in group for same in outcome.same_text),
            "texts": sum(len(outcome.same_text) for outcome in group),
        }
        for kind in kinds
        if (group := [outcome for outcome in outcomes if outcome.quantization == kind])
    }


def _report_on(name: str, outcomes: Sequence[Outcome], report: Report) -> None:
    exact = [outcome for outcome in outcomes if outcome.exact]
    quantized = [outcome for outcome in outcomes if not outcome.exact]
    if exact:
        worst = max(outcome.delta for outcome in exact)
        report.at_most(f"{name}, F32 and F16: largest difference of a logit / range", worst, MAX_DELTA)
        same = all(tokens == GREEDY_TOKENS for outcome in exact for tokens in outcome.same_text)
        report.is_true(f"{name}, F32 and F16: same {GREEDY_TOKENS} greedy tokens", same)
    if quantized:
        share = max(outcome.kl_share for outcome in quantized)
        report.at_most(f"{name}, quantized: largest KL / max(2 x llama.cpp's own, {KL_FLOOR:g})", share, 1.0)
    report.details[name] = _summary(outcomes)


def _run(cases: Iterable[Case], report: Report) -> list[Outcome]:
    outcomes = []
    for case in cases:
        outcome = compare(case)
        outcomes.append(outcome)
        lengths = "  ".join(f"{n}: {kl:.1e} / {own:.1e}" for n, (kl, own) in outcome.kl_by_length.items())
        mark = "ok  " if outcome.holds else "MISS"
        report.note(
            f"{mark} {case.name}: delta {outcome.delta:.1e}, text {outcome.same_text}, KL / own: {lengths}"
        )
    return outcomes


def main() -> int:
    """Run the benchmark; exit status 0 where every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a part of the matrix, about a minute")
    quick = parser.parse_args().quick
    report = Report("correctness")
    file_types = QUICK_FILE_TYPES if quick else tuple(FILE_TYPES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = quick_cases(folder) if quick else random_cases(folder)
        _report_on("random weights", _run(cases, report), report)
        for source in (STORIES, DEMO):
            if source.exists():
                outcomes = _run(trained_cases(source, folder, file_types, report), report)
                _report_on(source.stem, outcomes, report)
            else:
                report.note(f"{source} is absent; its part is left out")
    if STORIES.exists():
        mine, theirs = stories(STORIES)
        report.details["story"] = mine
        report.is_true("stories260K writes the same story as llama.cpp", mine == theirs)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
