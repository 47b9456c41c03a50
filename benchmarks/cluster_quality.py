"""What the recorded outcomes of the lossy runs do to answers: replayed on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cluster_speed import LOSSES
from benchmarks.replay import Recording, replay
from benchmarks.replay_facts import recall
from benchmarks.report import Report

QUALITY = 0.99
_FACTS_LOSS = 0.05


def quality(report: Report, folder: Path, *, quick: bool = False) -> None:
    """Perplexity on held-out text and recall of facts, under what `cluster_speed.lossy` recorded."""
    found: dict[str, Any] = {}
    worst = 0.0
    for loss in LOSSES:
        path = folder / f"outcomes-{loss:g}.npz"
        if not path.exists():
            continue
        recording = Recording.load(path)
        replayed = replay(recording, max_tokens=2000 if quick else 1 << 20)
        found[f"{loss:.0%} loss"] = replayed
        worst = max(worst, replayed["as recorded"]["perplexity"])
        print(f"     {loss:.0%} loss: {replayed['as recorded']}", flush=True)
        if loss == _FACTS_LOSS:
            facts = recall(recording, 200 if quick else 1000)
            report.details["facts"] = facts
            report.at_least("facts recalled at 5 % loss, x exact", facts["relaxed"] / facts["exact"], 0.97)
    report.details["replayed on the demo model"] = found
    if found:
        report.at_most("perplexity on held-out text at up to 10 % loss, x exact", worst, 1 / QUALITY)
