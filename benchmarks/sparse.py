"""What computing only some neuron groups saves: ``python -m benchmarks.sparse [--quick]``.

The FFN's part of a decoded token is its time less the time of the same token with no FFN at all.
Dense, half of the groups, all of the groups, and none take turns, token by token, within one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.engine import tiny_llama
from benchmarks.report import Report
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch, Floats
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.kv_tensors import KVType
from edge_runtime.engine.model import Model
from models.synthetic import SyntheticModel, write_synthetic_gguf

_PREFIX = [3 + 7 * index % 250 for index in range(32)]


def _open(path: Path, threads: int, kv_type: KVType = "f16") -> Model:
    gguf = GGUFFile(path)
    model = Model(gguf, read_hyperparameters(gguf), n_cells=256, threads=threads, kv_type=kv_type)
    model.cut_neuron_groups()
    return model


def _choices(model: Model) -> dict[str, dict[int, np.ndarray[tuple[int], np.dtype[np.int32]]]]:
    """Name -> neuron groups of each layer; the half that is chosen differs from layer to layer."""
    assert model.groups is not None
    n_groups, layers = model.groups.n_groups, range(model.hyperparameters.n_layers)
    generator = np.random.default_rng(0)

    def choose(count: int) -> dict[int, np.ndarray[tuple[int], np.dtype[np.int32]]]:
        return {layer: np.sort(generator.permutation(n_groups)[:count]).astype(np.int32) for layer in layers}

    return {"dense": {}, "all": choose(n_groups), "half": choose(n_groups // 2), "none": choose(0)}


def measure(report: Report, threads: int, rounds: int) -> None:
    """Time of a decoded token by share of groups."""
    model = _open(tiny_llama("Q4_0"), threads)
    model.forward(Batch(_PREFIX, range(32), 0, []))
    choices = _choices(model)
    batches = {name: Batch([5], [32], 0, groups=groups) for name, groups in choices.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(rounds + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            model.forward(batch)
            if number:  # the first round builds the graphs
                times[name].append(time.perf_counter() - started)
    model.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    ffn = {name: seconds - middle["none"] for name, seconds in middle.items()}
    shares = {name: ffn[name] / ffn["dense"] for name in ("half", "all")}
    assert model.groups is not None
    report.details[f"{threads} threads"] = {
        "seconds": middle,
        "share of dense": shares,
        "n_groups": model.groups.n_groups,
        "group_size": model.groups.group_size,
    }
    report.at_most(f"FFN time with half of the groups at {threads} threads, x dense", shares["half"], 0.62)


def _relative(found: Floats, wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _logits(path: Path, kv_type: KVType) -> float:
    """Difference of one token's logits, all groups beside dense."""
    model = _open(path, 2, kv_type)
    model.forward(Batch(_PREFIX, range(32), 0, []))
    choices = _choices(model)
    found = {
        name: model.forward(Batch([5], [32], 0, groups=choices[name])).logits[0] for name in ("dense", "all")
    }
    model.close()
    return _relative(found["all"], found["dense"])


def _ffn_outputs(path: Path) -> float:
    """Difference of one token's FFN outputs from the same input, in the worst layer."""
    model = _open(path, 2)
    model.forward(Batch(_PREFIX, range(32), 0, []))
    worst = 0.0
    for layer, groups in _choices(model)["all"].items():
        capture = Capture("ffn_output", layer)
        dense, grouped = (
            model.forward(Batch([5], [32], 0, groups=asked, capture=[capture])).captured[capture]
            for asked in ({}, {layer: groups})
        )
        worst = max(worst, _relative(grouped, dense))
    model.close()
    return worst


def compare(report: Report) -> None:
    """The grouped path with all groups beside the dense one.

    The two sum in different orders, about 1e-7 apart. Rounding to float16 keys or to quantized
    activations in a later layer turns that into 1e-4 or more whenever it tips a value over; so the
    logits are compared with float32 weights and keys, and for quantized weights each layer's FFN output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f32.gguf"
        shape = SyntheticModel(n_layers=6, n_embd=512, n_ff=1408, n_head=8, n_head_kv=2, n_vocab=2000)
        write_synthetic_gguf(path, shape)
        relative = _logits(path, "f32")
        report.details["logits with all groups beside dense, F32 weights, F16 keys"] = _logits(path, "f16")
    report.details["logits with all groups beside dense, Q4_0 weights"] = _logits(tiny_llama("Q4_0"), "f16")
    report.at_most("logits with all groups beside dense, F32 weights and keys, relative", relative, 1e-5)
    worst = _ffn_outputs(tiny_llama("Q4_0"))
    report.at_most("FFN output with all groups beside dense, Q4_0, worst layer, relative", worst, 1e-5)


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    report = Report("sparse")
    compare(report)
    for threads in (1, 2):
        measure(report, threads, 40 if options.quick else 200)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
