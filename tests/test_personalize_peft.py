"""PEFT adapters: their names, shapes and order of rows, reading undoes writing, damage is said."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_fixture import ARCHITECTURES, TOKENS, logits_with, product, random_changes, shapes_of, write_model
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import AdapterFileError, RequestError
from edge_runtime.personalize.peft import read_peft, write_peft

DOWN = "blk.1.ffn_down.weight"
DOWN_MODULE = "model.layers.1.mlp.down_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), "llama")


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
    written(folder, [_GOOD], model)
    assert sorted(entry.name for entry in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert {entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {0o600}
    assert len(read(folder, model)) == 1


def test_a_configuration_is_never_beside_the_numbers_of_another_adapter(model: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, [_GOOD], model)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()  # so that writing fails in the middle
    with pytest.raises(OSError):
        written(folder, [replace(_GOOD, scale=3.0)], model)
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
    written(tmp_path, [_GOOD], model)
    before = [entry.read_bytes() for entry in sorted(tmp_path.iterdir())]
    with pytest.raises(RequestError, match=says):
        written(tmp_path, [replace(_GOOD, **wrong)], model)
    assert [entry.read_bytes() for entry in sorted(tmp_path.iterdir())] == before


# --- what other programs write ----------------------------------------------------------------

_GOOD = random_changes({DOWN: (96, 64)}, ranks=[2], scales=[1.0])[0]


def save(folder: Path, tensors: dict[str, Any]) -> None:
    """Write tensors as the safetensors library does."""
    from safetensors.numpy import save_file

    save_file(tensors, folder / WEIGHTS)


def good_tensors() -> dict[str, NDArray[np.float32]]:
    return {
        f"base_model.model.{DOWN_MODULE}.lora_A.weight": _GOOD.a.copy(),
        f"base_model.model.{DOWN_MODULE}.lora_B.weight": _GOOD.b.copy(),
    }


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An adapter with as little in its configuration as PEFT's defaults allow."""
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}')
    save(tmp_path, good_tensors())
    return tmp_path


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
    assert np.array_equal(found.a, _GOOD.a)
    assert np.array_equal(found.b, _GOOD.b)


def test_half_precision_is_read(model: Path, foreign: Path) -> None:
    save(foreign, {name: values.astype(np.float16) for name, values in good_tensors().items()})
    (found,) = read(foreign, model)
    assert found.a.dtype == found.b.dtype == np.float32
    assert np.array_equal(found.a, _GOOD.a.astype(np.float16).astype(np.float32))
    assert np.array_equal(found.b, _GOOD.b.astype(np.float16).astype(np.float32))


def raw_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A_NAME, B_NAME = good_tensors()
A_ENTRY, B_ENTRY = entry([2, 96], 0, 768), entry([64, 2], 768, 1280)
BODY = _GOOD.a.tobytes() + np.ascontiguousarray(_GOOD.b).tobytes()


def test_bfloat16_is_read(model: Path, foreign: Path) -> None:
    halves = [
        (part.view(np.uint32) >> 16).astype(np.uint16) for part in (_GOOD.a, np.ascontiguousarray(_GOOD.b))
    ]
    header = {A_NAME: entry([2, 96], 0, 384, "BF16"), B_NAME: entry([64, 2], 384, 640, "BF16")}
    (foreign / WEIGHTS).write_bytes(raw_file(header, b"".join(half.tobytes() for half in halves)))
    (found,) = read(foreign, model)
    for mine, given_ in ((found.a, _GOOD.a), (found.b, _GOOD.b)):
        assert np.allclose(mine, given_, rtol=2**-7, atol=0)
        assert not np.array_equal(mine, given_)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; 'LORA' can be read"),
        ({"use_dora": True}, "use_dora is 'True'; False can be read"),
        ({"use_dora": 0}, "use_dora is '0'"),
        ({"bias": "all"}, "bias is 'all'; 'none' can be read"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; True can be read"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; true or false is needed"),
        ({"r": 3}, f"gives {DOWN_MODULE} the rank 3, its tensors have 2"),
        ({"rank_pattern": {"down_proj": 4}}, "the rank 4, its tensors have 2"),
        ({"r": True}, "r is 'True'; a finite number is needed"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'; a finite number is needed"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e60}, "within the range of float32"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "names of modules are read, other regular expressions are not"),
        ({"alpha_pattern": {".*": 1}}, "other regular expressions are not"),
        ({"alpha_pattern": {"": 1}}, "other regular expressions are not"),
        ({"alpha_pattern": {"down_proj": None}}, r"alpha_pattern.down_proj is 'None'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .*; an object is needed"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    model: Path, foreign: Path, settings_: dict[str, Any], says: str
) -> None:
    configure(foreign, **settings_)
    with pytest.raises(AdapterFileError, match=says) as caught:
        read(foreign, model)
    assert str(foreign) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no file, or an empty one"),
        (b"{", "its JSON cannot be read"),
        (b"\xff{}", "its JSON cannot be read"),
        (b"[" * 100_000, "its JSON cannot be read"),
        (b"[]", "it holds a JSON list, needed is an object"),
        (b'{"r": 2, "r": 2}', "a name occurs twice"),
        (b'{"r": 2}', "peft_type is 'None'"),
        (b"{}" + b" " * (1 << 20), "at most 1048576 are read"),
    ],
)
def test_what_is_no_configuration_is_refused(model: Path, foreign: Path, content: bytes, says: str) -> None:
    (foreign / CONFIG).write_bytes(content)
    with pytest.raises(AdapterFileError, match=says):
        read(foreign, model)


_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "too short": (b"\0" * 7, "it has 7 bytes; a safetensors file has at least 8"),
    "a header without end": (
        raw_file({}, length=1 << 60),
        "its header would be 1152921504606846976 bytes long",
    ),
    "a long header": (raw_file({}, length=3), "its header would be 3 bytes long, of 10"),
    "no JSON": (raw_file(b"{'a': 1}"), "its JSON cannot be read"),
    "no object": (raw_file([]), "a JSON list"),
    "a name twice": (
        raw_file(
            f'{{"{A_NAME}": {json.dumps(A_ENTRY)}, "{A_NAME}": {json.dumps(A_ENTRY)}}}'.encode(), BODY[:768]
        ),
        "a name occurs twice",
    ),
    "no description": (raw_file({A_NAME: 1}), "described by something else"),
    "more than a description": (
        raw_file({A_NAME: {**A_ENTRY, "stride": 1}}, BODY[:768]),
        "described by something",
    ),
    "another type": (
        raw_file({A_NAME: entry([2], 0, 16, "I64")}, bytes(16)),
        "of the type 'I64'; F32, F16, BF16",
    ),
    "a type that is none": (raw_file({A_NAME: {**A_ENTRY, "dtype": ["F32"]}}, BODY[:768]), "of the type"),
    "a negative axis": (raw_file({A_NAME: entry([-2, -96], 0, 768)}, BODY[:768]), "the shape or the place"),
    "half an axis": (raw_file({A_NAME: entry([2.0, 96], 0, 768)}, BODY[:768]), "the shape or the place"),
    "a true axis": (raw_file({A_NAME: entry([True, 192], 0, 768)}, BODY[:768]), "the shape or the place"),
    "a huge axis": (
        raw_file({A_NAME: entry([1 << 62, 1 << 62], 0, 768)}, BODY[:768]),
        "the shape or the place",
    ),
    "an endless axis": (raw_file(f'{{"a": {"9" * 5000}}}'.encode()), "its JSON cannot be read"),
    "one offset": (
        raw_file({A_NAME: {**A_ENTRY, "data_offsets": [0]}}, BODY[:768]),
        "the shape or the place",
    ),
    "a wrong size": (
        raw_file({A_NAME: entry([2, 95], 0, 768)}, BODY[:768]),
        "has 768 bytes; its shape and type need 760",
    ),
    "backwards": (raw_file({A_NAME: entry([0], 8, 0)}, BODY[:8]), "has -8 bytes"),
    "behind the end": (raw_file({A_NAME: A_ENTRY, B_NAME: B_ENTRY}, BODY[:-1]), "its header speaks of"),
    "more at the end": (raw_file({A_NAME: A_ENTRY, B_NAME: B_ENTRY}, BODY + b"x"), "its header speaks of"),
    "a gap": (
        raw_file({A_NAME: entry([2, 96], 4, 772)}, bytes(4) + BODY[:768]),
        "starts at byte 4 of the numbers, 0",
    ),
    "an overlap": (
        raw_file({A_NAME: A_ENTRY, B_NAME: entry([64, 2], 256, 768)}, BODY[:768]),
        "starts at byte 256 of the numbers, 768",
    ),
    "A alone": (raw_file({A_NAME: A_ENTRY}, BODY[:768]), "down_proj has lora_A.weight and no lora_B.weight"),
    "B alone": (
        raw_file({B_NAME: entry([64, 2], 0, 512)}, BODY[768:]),
        "has lora_B.weight and no lora_A.weight",
    ),
    "nothing": (raw_file({}), "changes nothing"),
    "no numbers": (
        raw_file({A_NAME: entry([0, 96], 0, 0), B_NAME: entry([64, 0], 0, 0)}),
        r"A \(0, 96\) and B",
    ),
    "three axes": (raw_file({A_NAME: entry([2, 96, 1], 0, 768), B_NAME: B_ENTRY}, BODY), "do not fit"),
    "A and B exchanged": (
        raw_file({B_NAME: A_ENTRY, A_NAME: B_ENTRY}, BODY),
        r"do not fit blk.1.ffn_down.weight; needed are \(rank, 96\) and .*; is it an adapter of llama.gguf",
    ),
    "not finite": (raw_file({A_NAME: A_ENTRY, B_NAME: B_ENTRY}, b"\0\0\x80\x7f" * 320), "not finite"),
    "another layer": (
        raw_file({A_NAME.replace("s.1", "s.2"): A_ENTRY, B_NAME.replace("s.1", "s.2"): B_ENTRY}, BODY),
        "layers.2.mlp.down_proj.* changes nothing that llama.gguf has",
    ),
    "the embedding": (
        raw_file({"base_model.model.model.embed_tokens.lora_embedding_A": A_ENTRY}, BODY[:768]),
        "embed_tokens.* changes nothing that llama.gguf has",
    ),
    "DoRA": (
        raw_file(
            {
                A_NAME: A_ENTRY,
                B_NAME: B_ENTRY,
                A_NAME.replace("A.w", "magnitude_vector.w"): entry([1], 1280, 1284),
            },
            BODY + bytes(4),
        ),
        "changes nothing that",
    ),
}


def test_the_parts_of_these_files_are_sound(model: Path, foreign: Path) -> None:
    (foreign / WEIGHTS).write_bytes(raw_file({"__metadata__": {}, A_NAME: A_ENTRY, B_NAME: B_ENTRY}, BODY))
    (found,) = read(foreign, model)
    assert np.array_equal(found.b, _GOOD.b)


@pytest.mark.parametrize("kind", _WEIGHTS)
def test_what_is_no_adapter_of_this_model_is_refused(model: Path, foreign: Path, kind: str) -> None:
    content, says = _WEIGHTS[kind]
    (foreign / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterFileError, match=says) as caught:
        read(foreign, model)
    assert str(foreign) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_missing_files_are_said(model: Path, foreign: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"adapter_config.json cannot be opened: No such file"):
        read(foreign / "nowhere", model)
    with pytest.raises(AdapterFileError, match=r"cannot be opened: Not a directory.*is it the folder of"):
        read(model, model)
    (foreign / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors cannot be opened"):
        read(foreign, model)
    (foreign / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"has adapter_model.bin alone.*save it as safetensors"):
        read(foreign, model)
    (foreign / WEIGHTS).mkdir()
    with pytest.raises(AdapterFileError, match="is no file"):
        read(foreign, model)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F32", "F16", "BF16", "LORA", A_NAME, B_NAME, "down_proj", "(a|b)*", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", A_NAME]), inner, max_size=3)
    ),
    max_leaves=6,
)


def spoilt(draw: Any, value: Any) -> Any:
    """The same JSON with one place changed, mostly deep inside."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return {name: entry_ for name, entry_ in value.items() if name != key}
        if kind == 1:
            return {**value, draw(st.sampled_from([A_NAME, B_NAME, "__metadata__", "x"])): value[key]}
        return {**value, key: spoilt(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], spoilt(draw, value[index]), *value[index + 1 :]]
    if type(value) is int and draw(st.booleans()):
        return value + draw(st.sampled_from([-768, -4, -1, 1, 4, 768]))
    return draw(_JSON)


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_anything_but_a_clear_error_or_sound_changes(
    model: Path, tmp_path: Path, data: st.DataObject
) -> None:
    header: Any = {"__metadata__": {"format": "pt"}, A_NAME: A_ENTRY, B_NAME: B_ENTRY}
    config: Any = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 1},
        "alpha_pattern": {},
    }
    for _ in range(data.draw(st.integers(0, 2))):
        header = spoilt(data.draw, header)
    if data.draw(st.booleans()):
        config = spoilt(data.draw, config)
    content = bytearray(raw_file(header, BODY))
    kind = data.draw(st.integers(0, 5))
    if kind == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    elif kind == 1:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes(content)
    try:
        found = read(tmp_path, model)
    except AdapterFileError:
        return
    assert [change.matrix for change in found] == [DOWN]
    (change,) = found
    assert (change.a.shape, change.b.shape) == ((2, 96), (64, 2))
    assert np.isfinite(change.a).all()
    assert np.isfinite(change.b).all()
    assert np.isfinite(np.float32(change.scale))
