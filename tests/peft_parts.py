"""PEFT adapters as other programs write them, whole and in pieces."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lora_fixture import random_changes
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.personalize.peft import read_peft, write_peft

DOWN = "blk.1.ffn_down.weight"
DOWN_MODULE = "model.layers.1.mlp.down_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def written(folder: Path, changes: Sequence[LowRank], model: Path) -> Path:
    with GGUFFile(model) as gguf:
        write_peft(folder, changes, gguf)
    return folder


def read(folder: Path, model: Path) -> tuple[LowRank, ...]:
    with GGUFFile(model) as gguf:
        return read_peft(folder, gguf)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def configure(folder: Path, **values: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**config_of(folder), **values}))


GOOD = random_changes({DOWN: (96, 64)}, ranks=[2], scales=[1.0])[0]


def save(folder: Path, tensors: dict[str, Any]) -> None:
    """Write tensors as the safetensors library does."""
    from safetensors.numpy import save_file

    save_file(tensors, folder / WEIGHTS)


def good_tensors() -> dict[str, NDArray[np.float32]]:
    return {
        f"base_model.model.{DOWN_MODULE}.lora_A.weight": GOOD.a.copy(),
        f"base_model.model.{DOWN_MODULE}.lora_B.weight": GOOD.b.copy(),
    }


def foreign_adapter(folder: Path) -> Path:
    """An adapter with as little in its configuration as PEFT's defaults allow."""
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}')
    save(folder, good_tensors())
    return folder


def raw_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A_NAME, B_NAME = good_tensors()
A_ENTRY, B_ENTRY = entry([2, 96], 0, 768), entry([64, 2], 768, 1280)
BODY = GOOD.a.tobytes() + np.ascontiguousarray(GOOD.b).tobytes()
