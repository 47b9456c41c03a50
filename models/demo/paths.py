"""Where the files of the demo model lie."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL_PATH = FOLDER / "edge-demo-q8_0.gguf"
FACTS_PATH = FOLDER / "facts.json"
HELD_OUT_PATH = FOLDER / "heldout.txt"
SAMPLES_PATH = FOLDER / "tokenizer_samples.jsonl"
WORK_FOLDER = FOLDER.parents[1] / ".cache" / "demo"
