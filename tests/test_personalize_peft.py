"""PEFT adapters: their names, shapes and order of rows, reading undoes writing, damage is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_fixture import ARCHITECTURES, TOKENS, logits_with, product, random_changes, shapes_of, write_model
from numpy.typing import NDArray
from peft_parts import (
    A_NAME,
    B_NAME,
    CONFIG,
    DOWN,
    DOWN_MODULE,
    GOOD,
    WEIGHTS,
    config_of,
    configure,
    entry,
    foreign_adapter,
    good_tensors,
    raw_file,
    read,
    save,
    written,
)

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import RequestError
from edge_runtime.personalize.peft import write_peft


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), "llama")


# --- names, shapes, order ---------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_transformers_library(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = written(tmp_path, random_changes(shapes_of(model), ranks=[2], scales=[1.5]), model)
    found = {name: values.shape for name, values in load_file(folder / WEIGHTS).items()}
    layer = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 32),
        "self_attn.v_proj": (64, 32),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (64, 96),
        "mlp.up_proj": (64, 96),
        "mlp.down_proj": (96, 64),
    }
    modules = {f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    modules["lm_head"] = (64, 300)
    expected = {}
    for name, (n_in, n_out) in modules.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (2, n_in)
        expected[f"base_model.model.{name}.lora_B.weight"] = (n_out, 2)
    assert found == expected
    assert config_of(folder) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 3,
        "target_modules": list(modules),
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def test_ranks_and_scales_that_differ_are_in_the_patterns(model: Path, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in shapes_of(model).items() if name.endswith("ffn_down.weight")}
    first, second = random_changes(shapes, ranks=[2, 3], scales=[0.5])
    third = random_changes({"output.weight": (64, 300)}, ranks=[2], scales=[0.3])[0]
    with GGUFFile(model) as gguf:
        write_peft(tmp_path, [first, second, third], gguf, "acme/tiny")
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (2, 1)
    assert config["rank_pattern"] == {DOWN_MODULE: 3}
    assert config["alpha_pattern"] == {DOWN_MODULE: 1.5, "lm_head": 0.6}
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj", DOWN_MODULE, "lm_head"]
    assert config["base_model_name_or_path"] == "acme/tiny"


def tensor_of(folder: Path, module: str, part: str) -> NDArray[np.float32]:
    from safetensors.numpy import load_file

    values: NDArray[np.float32] = load_file(folder / WEIGHTS)[f"base_model.model.{module}.lora_{part}.weight"]
    return values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_queries_and_keys_are_halves_of_heads_in_llama_alone(
    tmp_path: Path, architecture: str
) -> None:
    """Pair p of a head, neighbours 2 p and 2 p + 1 in a GGUF, are p and p + half a head for transformers."""
    path = write_model(tmp_path, architecture)
    shapes = {name: shape for name, shape in shapes_of(path).items() if name.startswith("blk.1.attn_")}
    changes = [
        LowRank(name, np.ones((1, n_in), np.float32), np.arange(n_out, dtype=np.float32)[:, None])
        for name, (n_in, n_out) in shapes.items()
    ]
    folder = written(tmp_path / "peft", changes, path)
    head = 32 if architecture == "qwen3" else 16
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        found = tensor_of(folder, f"model.layers.1.self_attn.{module}", "B")[:, 0]
        expected = np.arange(len(found), dtype=np.float32)
        if architecture == "llama" and module in ("q_proj", "k_proj"):
            expected = np.zeros(len(found), np.float32)
            for start in range(0, len(found), head):
                for pair in range(head // 2):
                    expected[start + pair] = start + 2 * pair
                    expected[start + pair + head // 2] = start + 2 * pair + 1
        assert found.tolist() == expected.tolist(), module


@pytest.mark.train
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_torch_computes_the_same_with_the_exported_adapter(tmp_path: Path, architecture: str) -> None:
    """W + alpha / r * B A on the transformers library's weights gives the engine's logits.

    Measured: 2.5e-7 of the range, with float32 keys and values.
    """
    from safetensors.torch import load_file
    from transformers_forward import logits_of, state_of

    path = write_model(tmp_path, architecture)
    changes = random_changes(shapes_of(path))
    folder = written(tmp_path / "peft", changes, path)
    state, config = state_of(path), config_of(folder)
    plain = logits_of(path, state, TOKENS)
    assert np.abs(plain - logits_with(path, [], "f32")).max() <= 1e-5 * np.ptp(plain)
    tensors = load_file(folder / WEIGHTS)
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        rank = config["rank_pattern"].get(module, config["r"])
        assert rank == len(a)
        state[f"{module}.weight"] += config["alpha_pattern"].get(module, config["lora_alpha"]) / rank * b @ a
    wanted = logits_of(path, state, TOKENS)
    assert np.abs(wanted - plain).max() > 0.05 * np.ptp(plain), "the adapter does too little to be seen"
    for mine in (changes, read(folder, path)):
        assert np.abs(logits_with(path, mine, "f32") - wanted).max() <= 1e-5 * np.ptp(wanted)


# --- writing and reading ----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("ranks", "scales"), [([1], [1.0]), ([2], [0.5, -3.0]), ([1, 2, 3, 5, 8], [0.7, 0.1]), ([3], [0.0])]
)
def test_reading_undoes_writing_to_the_last_bit(
    tmp_path: Path, architecture: str, ranks: list[int], scales: list[float]
) -> None:
    path = write_model(tmp_path, architecture)
    changes = random_changes(shapes_of(path), ranks=ranks, scales=scales)
    found = read(written(tmp_path / "peft", changes, path), path)
    assert [change.matrix for change in found] == [change.matrix for change in changes]
    for mine, given_ in zip(found, changes, strict=True):
        assert mine.a.tobytes() == given_.a.tobytes()
        assert np.ascontiguousarray(mine.b).tobytes() == given_.b.tobytes()
        assert np.float32(mine.scale) == np.float32(given_.scale)


def test_a_tied_head_can_be_exported(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", tied_head=True)
    changes = random_changes({"output.weight": (64, 300)})
    (found,) = read(written(tmp_path / "peft", changes, path), path)
    assert np.array_equal(found.b, changes[0].b)


def test_several_changes_of_a_matrix_become_one(model: Path, tmp_path: Path) -> None:
    first, second = (
        random_changes({DOWN: (96, 64)}, ranks=[rank], scales=[0.5 * rank])[0] for rank in (1, 4)
    )
    (found,) = read(written(tmp_path, [first, second], model), model)
    assert found.a.shape == (5, 96)
    assert np.allclose(product(found), product(first) + product(second), rtol=0, atol=1e-7)


def test_writing_replaces_an_adapter_and_is_private(model: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "new" / "folder", random_changes(shapes_of(model)), model)
    written(folder, [GOOD], model)
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert {entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {0o600}
    assert len(read(folder, model)) == 1


def test_a_configuration_is_never_beside_the_numbers_of_another_adapter(model: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, [GOOD], model)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()  # so that writing fails in the middle
    with pytest.raises(OSError):
        written(folder, [replace(GOOD, scale=3.0)], model)
    assert not (folder / CONFIG).exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"matrix": "blk.2.ffn_down.weight"}, "no matrix"),
        ({"scale": float("nan")}, "not finite"),
        ({"scale": 1.7e308}, "a scale times its rank is inf"),
    ],
)
def test_what_does_not_fit_the_model_is_not_written(
    model: Path, tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    written(tmp_path, [GOOD], model)
    before = [entry.read_bytes() for entry in sorted(tmp_path.iterdir())]
    with pytest.raises(RequestError, match=says):
        written(tmp_path, [replace(GOOD, **wrong)], model)
    assert [entry.read_bytes() for entry in sorted(tmp_path.iterdir())] == before


# --- what other programs write ----------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings_", "scale"),
    [
        ({}, 4.0),
        ({"lora_alpha": 16}, 8.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / 2**0.5),
        ({"r": 64, "rank_pattern": {"down_proj": 2}}, 4.0),
        ({"alpha_pattern": {"mlp.down_proj": 6, "down_proj": 2}}, 3.0),
        ({"alpha_pattern": {"p.down_proj": 6, "own_proj": 6}}, 4.0),
        ({"alpha_pattern": {"q_proj": 6, r"^model\.layers\.1\.mlp\.down_proj": 5.0}}, 2.5),
        ({"alpha_pattern": {"^mlp.down_proj": 6}}, 4.0),
        ({"rank_pattern": None, "bias": "none", "use_dora": False, "modules_to_save": None, "x": 1}, 4.0),
        ({"init_lora_weights": False}, 4.0),
        ({"init_lora_weights": "gaussian", "loftq_config": {}, "peft_version": "0.21.2"}, 4.0),
        ({"layers_to_transform": [1], "exclude_modules": None, "lora_dropout": 0.1}, 4.0),
    ],
)
def test_ranks_and_alphas_are_those_of_peft(
    model: Path, foreign: Path, settings_: dict[str, Any], scale: float
) -> None:
    configure(foreign, **settings_)
    (found,) = read(foreign, model)
    assert found.scale == pytest.approx(scale, rel=1e-12)
    assert found.matrix == DOWN
    assert np.array_equal(found.a, GOOD.a)
    assert np.array_equal(found.b, GOOD.b)


def test_half_precision_is_read(model: Path, foreign: Path) -> None:
    save(foreign, {name: values.astype(np.float16) for name, values in good_tensors().items()})
    (found,) = read(foreign, model)
    assert found.a.dtype == found.b.dtype == np.float32
    assert np.array_equal(found.a, GOOD.a.astype(np.float16).astype(np.float32))
    assert np.array_equal(found.b, GOOD.b.astype(np.float16).astype(np.float32))


def test_bfloat16_is_read(model: Path, foreign: Path) -> None:
    halves = [
        (part.view(np.uint32) >> 16).astype(np.uint16) for part in (GOOD.a, np.ascontiguousarray(GOOD.b))
    ]
    header = {A_NAME: entry([2, 96], 0, 384, "BF16"), B_NAME: entry([64, 2], 384, 640, "BF16")}
    (foreign / WEIGHTS).write_bytes(raw_file(header, b"".join(half.tobytes() for half in halves)))
    (found,) = read(foreign, model)
    for mine, given_ in ((found.a, GOOD.a), (found.b, GOOD.b)):
        assert np.allclose(mine, given_, rtol=2**-7, atol=0)
        assert not np.array_equal(mine, given_)
