"""Several devices answering together, measured in the netlab: speed, loss, quality, faults.

``python -m benchmarks.cluster [--quick] [PART ...]``. Hosts are network namespaces, each pinned to one core,
with one thread. Speed is measured on a model of TinyLlama-1.1B's shape in Q4_0 with random weights, which
borrows the demo model's calibration; what its recorded outcomes do to answers is replayed on the demo model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.cluster_faults import faults
from benchmarks.cluster_lab import borrow_calibration
from benchmarks.cluster_quality import quality
from benchmarks.cluster_speed import clean, lossy, peer, too_slow_a_network
from benchmarks.engine import tiny_llama
from benchmarks.netlab import why_not
from benchmarks.report import Report


def main() -> int:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="clean, lossy, alone, peer, quality, faults")
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"no lab can be made here: {reason}")
        return 2
    report = Report("cluster")
    path = tiny_llama("Q4_0", pure=True)
    borrow_calibration(path)
    tokens = 24 if options.quick else 64
    rounds = 2 if options.quick else 5

    with tempfile.TemporaryDirectory(prefix="edgert-cluster-") as name:
        folder = Path(name)
        parts: dict[str, Callable[[], object]] = {
            "clean": lambda: clean(report, path, folder, tokens=tokens, rounds=rounds),
            "lossy": lambda: lossy(report, path, folder, tokens=tokens, rounds=rounds),
            "alone": lambda: too_slow_a_network(report, path, folder),
            "peer": lambda: peer(report, tokens=tokens),
            "quality": lambda: quality(report, folder, quick=options.quick),
            "faults": lambda: faults(report, folder, quick=options.quick),
        }
        unknown = set(options.parts) - parts.keys()
        if unknown:
            parser.error(f"no such part: {', '.join(sorted(unknown))}")
        for part, run in parts.items():
            if not options.parts or part in options.parts:
                print(f"# {part}", flush=True)
                run()
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
