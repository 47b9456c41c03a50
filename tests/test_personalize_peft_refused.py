"""PEFT adapters that are damaged, of another model, or mean what the engine cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_fixture import write_model
from peft_parts import (
    A_ENTRY,
    A_NAME,
    B_ENTRY,
    B_NAME,
    BODY,
    CONFIG,
    DOWN,
    DOWN_MODULE,
    GOOD,
    WEIGHTS,
    configure,
    entry,
    foreign_adapter,
    raw_file,
    read,
)

from edge_runtime.errors import AdapterFileError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return foreign_adapter(tmp_path)


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
    assert np.array_equal(found.b, GOOD.b)


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
