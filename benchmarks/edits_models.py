"""The demo model in the quantizations that edits are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.correctness_trained import requantized
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.personalize.preparing import prepare
from edge_runtime.personalize.statistics import load_statistics, save_statistics
from models.demo.paths import MODEL_PATH

_CACHE = Path(__file__).parent.parent / ".cache" / "benchmarks"


def demo_models() -> Mapping[str, Path]:
    """Label -> file, with statistics for edits beside it."""
    return {"Q8_0": MODEL_PATH, "Q4_0": _requantized()}


def _requantized() -> Path:
    """The demo model as Q4_0, by llama.cpp's quantizer; made once. Its statistics are this program's."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    path = _CACHE / "edge-demo-q4_0.gguf"
    if not path.exists():
        requantized(MODEL_PATH, "Q4_0", path.with_suffix(".unfinished")).replace(path)
    with GGUFFile(MODEL_PATH) as other:
        layer = load_statistics(other).layer
    with Engine.load(path, EngineOptions(threads=1)) as engine:
        save_statistics(prepare(engine, layers=[layer]), engine.gguf)
    return path
