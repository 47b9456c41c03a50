"""Adapters as folders of the PEFT library: adapter_config.json beside adapter_model.safetensors.

Modules have the names of the transformers library (``model.layers.3.mlp.down_proj``), and W becomes
W + alpha / r * B A. GGUF files of LLaMA models have the rows of the queries' and keys' matrices in another
order: llama.cpp rotates neighbours, transformers the two halves of a head (convert_hf_to_gguf.py, permute).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import Hyperparameters, read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.weights import HEAD
from edge_runtime.errors import AdapterFileError, RequestError
from edge_runtime.personalize.model_matrices import joined, matrix_shapes, misfit
from edge_runtime.personalize.safetensors_file import damaged, encode_safetensors, read_json, read_safetensors
from edge_runtime.private_files import write_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # PEFT's own wrapping of the model
_A, _B = ".lora_A.weight", ".lora_B.weight"
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Settings under which the tensors alone do not say what the adapter computes -> the values that are fine.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    # The others start from weights of the model that they change too.
    "init_lora_weights": (True, False, "gaussian", "eva"),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
# PEFT takes regular expressions; a hostile one would keep the device busy for years.
_MODULE_NAME = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")


# --- writing ----------------------------------------------------------------------------------


def write_peft(
    folder: Path, changes: Sequence[LowRank], gguf: GGUFFile, base_model: str | None = None
) -> None:
    """Write an adapter of a model as F32; A and B as they are, scales and ranks in the configuration.

    Args:
        folder: made where it is missing; an adapter in it is replaced.
        gguf: the model.
        base_model: name or path of the model in the transformers library's format, where there is one.

    Raises:
        RequestError: a change does not fit the model.
        OSError: the files cannot be written.
    """
    hyperparameters = read_hyperparameters(gguf)
    shapes = matrix_shapes(gguf, hyperparameters)
    modules = {module: matrix for matrix, module in _modules_of(shapes).items()}
    by_matrix = {change.matrix: change for change in joined(changes, shapes)}
    named = {module: by_matrix[matrix] for module, matrix in modules.items() if matrix in by_matrix}
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, change in named.items():
        tensors[_PREFIX + module + _A] = np.asarray(change.a, np.float32)
        b = np.asarray(change.b, np.float32)
        tensors[_PREFIX + module + _B] = _rows_to_transformers(b, change.matrix, hyperparameters)
    config = _config(named, base_model)
    # Without a configuration the folder is no adapter: the old one is never beside new numbers.
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    write_file(folder / WEIGHTS_NAME, encode_safetensors(tensors, {"format": "pt"}), 0o600)
    write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode(), 0o600)


def _config(named: Mapping[str, LowRank], base_model: str | None) -> dict[str, Any]:
    ranks = {module: change.a.shape[0] for module, change in named.items()}
    alphas = {module: _number(change.scale * ranks[module]) for module, change in named.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    ((alpha, _),) = Counter(alphas.values()).most_common(1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(named),
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _number(alpha: float) -> int | float:
    """Alpha as people write it: whole numbers without a point."""
    if not math.isfinite(alpha):
        raise RequestError(f"a scale times its rank is {alpha}; a finite number is needed")
    return int(alpha) if alpha.is_integer() and abs(alpha) < 1 << 53 else float(alpha)


def _modules_of(matrices: Mapping[str, object]) -> dict[str, str]:
    """Matrix -> module of the transformers library."""
    found = {}
    for matrix in matrices:
        if matrix == HEAD:
            found[matrix] = "lm_head"
        else:
            _, layer, kind, _ = matrix.split(".")
            found[matrix] = f"model.layers.{layer}.{_MODULES[kind]}"
    return found


# --- reading ----------------------------------------------------------------------------------


def read_peft(folder: Path, gguf: GGUFFile) -> tuple[LowRank, ...]:
    """Read a PEFT LoRA of this model; nothing in it is trusted.

    Args:
        gguf: the model.

    Returns:
        one change a matrix, in the model's order, with the scale alpha / r.

    Raises:
        AdapterFileError: a file is missing, damaged, of another model, or asks for what this engine cannot.
    """
    hyperparameters = read_hyperparameters(gguf)
    shapes = matrix_shapes(gguf, hyperparameters)
    config = _Config(folder / CONFIG_NAME)
    path = folder / WEIGHTS_NAME
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder} has adapter_model.bin alone, which can hold programs; save it as safetensors"
        )
    tensors = read_safetensors(path)
    changes = []
    for matrix, module in _modules_of(shapes).items():
        a, b = tensors.pop(_PREFIX + module + _A, None), tensors.pop(_PREFIX + module + _B, None)
        if a is None and b is None:
            continue
        if a is None or b is None:
            there, missing = (_B, _A) if a is None else (_A, _B)
            raise damaged(path, f"{module} has {there[1:]} and no {missing[1:]}")
        change = LowRank(matrix, a, b)
        if (wrong := misfit(change, shapes)) is not None:
            raise AdapterFileError(f"{path}: {wrong}; is it an adapter of {gguf.path.name}?")
        scale = config.scale(module, a.shape[0])
        b = _rows_from_transformers(b, matrix, hyperparameters)
        changes.append(replace(change, b=b, scale=scale))
    if tensors:
        raise AdapterFileError(
            f"{path}: {next(iter(tensors))[:120]!r} changes nothing that {gguf.path.name} has and this "
            "engine can change; is it an adapter of another model?"
        )
    if not changes:
        raise AdapterFileError(f"{path} changes nothing")
    return tuple(changes)


class _Config:
    """An adapter_config.json that has been checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = read_json(path)
        for key, fine in _PLAIN.items():
            found = self._values.get(key, None if key == "peft_type" else fine[0])
            if not any(type(found) is type(each) and found == each for each in fine):
                raise self._refused(key, found, f"{fine[0]!r} can be read")
        self._ranks, self._alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")
        self._rank = self._finite("r", self._values.get("r", 8))  # PEFT's own defaults
        self._alpha = self._finite("lora_alpha", self._values.get("lora_alpha", 8))
        rslora = self._values.get("use_rslora", False)
        if type(rslora) is not bool:
            raise self._refused("use_rslora", rslora, "true or false is needed")
        self._rslora = rslora

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by.

        Raises:
            AdapterFileError: the configuration asks for another rank.
        """
        announced = self._of(self._ranks, module, self._rank)
        if announced != rank:
            raise AdapterFileError(
                f"{self._path} gives {module} the rank {announced:g}, its tensors have {rank}"
            )
        scale = self._of(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._rslora else rank)
        if not abs(scale) <= float(np.finfo(np.float32).max):
            raise self._refused("lora_alpha", scale * rank, "a number within the range of float32 is needed")
        return scale

    @staticmethod
    def _of(pattern: Mapping[str, float], module: str, default: float) -> float:
        """As PEFT's `get_pattern_key`: the first name that the module's ends with decides."""
        for name, value in pattern.items():
            if module == name.removeprefix("^") or module.endswith("." + name):
                return value
        return default

    def _pattern(self, key: str) -> dict[str, float]:
        found = self._values.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise self._refused(key, found, "an object is needed")
        checked = {}
        for name, value in found.items():
            plain = name.replace("\\.", ".")
            if not _MODULE_NAME.fullmatch(plain):
                raise self._refused(key, name, "names of modules are read, other regular expressions are not")
            checked[plain] = self._finite(f"{key}.{name}", value)
        return checked

    def _finite(self, key: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(value) <= 1e300:  # type: ignore[arg-type]
            raise self._refused(key, value, "a finite number is needed")
        return float(value)  # type: ignore[arg-type]

    def _refused(self, key: str, found: object, needed: str) -> AdapterFileError:
        return AdapterFileError(f"{self._path}: {key} is {str(found)[:80]!r}; {needed}")


# --- the order of rows ------------------------------------------------------------------------


def _rows_to_transformers(
    b: NDArray[np.float32], matrix: str, hyperparameters: Hyperparameters
) -> NDArray[np.float32]:
    """Rows (n_out, rank) in the order of the transformers library."""
    heads = _rotated_heads(matrix, hyperparameters)
    return b if heads is None else b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _rows_from_transformers(
    b: NDArray[np.float32], matrix: str, hyperparameters: Hyperparameters
) -> NDArray[np.float32]:
    """Rows (n_out, rank) in the order of the GGUF."""
    heads = _rotated_heads(matrix, hyperparameters)
    return b if heads is None else b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _rotated_heads(matrix: str, hyperparameters: Hyperparameters) -> int | None:
    """How many heads a matrix has whose rows lie otherwise in the GGUF; None where they do not."""
    if hyperparameters.rope.neox:
        return None
    heads = {"attn_q": hyperparameters.n_head, "attn_k": hyperparameters.n_head_kv}
    return heads.get(matrix.split(".")[-2])
