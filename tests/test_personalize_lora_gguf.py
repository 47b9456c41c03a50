"""GGUF LoRA files: llama.cpp gives the same logits with them, reading undoes writing, damage is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as second_opinion
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_fixture import ARCHITECTURES, TOKENS, logits_with, product, random_changes, shapes_of, write_model
from model_damage import Parts, Tensor, damaged_file, scalar, string, take_apart
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import AdapterFileError, RequestError
from edge_runtime.personalize.lora_gguf import read_lora_gguf, write_lora_gguf

DOWN = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"), "llama")


def written(path: Path, changes: Sequence[LowRank], model: Path) -> Path:
    with GGUFFile(model) as gguf:
        write_lora_gguf(path, changes, gguf)
    return path


def read(path: Path, model: Path) -> tuple[LowRank, ...]:
    with GGUFFile(model) as gguf:
        return read_lora_gguf(path, gguf)


def llama_cpp_logits(model: Path, lora: Path | None) -> NDArray[np.float32]:
    import llama_cpp

    oracle = llama_cpp.Llama(
        str(model),
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        flash_attn=True,
        verbose=False,
        lora_path=lora and str(lora),
    )
    oracle.eval(TOKENS)
    logits = np.array(oracle.scores[: len(TOKENS)])
    oracle.close()
    return logits


# --- llama.cpp --------------------------------------------------------------------------------


def assert_llama_cpp_agrees(model: Path, changes: Sequence[LowRank], folder: Path, tolerance: float) -> None:
    """With the file, llama.cpp gives the logits that the engine gives with `changes`, and with the file."""
    path = written(folder / "adapter.gguf", changes, model)
    plain, wanted = llama_cpp_logits(model, None), llama_cpp_logits(model, path)
    assert np.abs(wanted - plain).max() > 5 * tolerance * np.ptp(plain), "the adapter does too little"
    for mine in (changes, read(path, model)):
        assert np.abs(logits_with(model, mine) - wanted).max() <= tolerance * np.ptp(wanted)


# Measured: 0.0 with what is read from the file. With the changes themselves, scales that went into B are
# rounded otherwise: 4e-5 of the range in F32; in Q8_0 an activation may get the next code: 2.4e-3.
F32_TOLERANCE, Q8_0_TOLERANCE = 2e-4, 1e-2


@pytest.mark.parametrize("gain", [0.1, 0.3])
def test_llama_cpp_gives_the_same_logits_on_the_demo_model(
    demo_model: Path, tmp_path: Path, gain: float
) -> None:
    changes = random_changes(shapes_of(demo_model, head=False), gain=gain)
    assert_llama_cpp_agrees(demo_model, changes, tmp_path, Q8_0_TOLERANCE)


def test_llama_cpp_gives_the_same_logits_on_a_trained_f32_model(shared_data: Path, tmp_path: Path) -> None:
    stories = shared_data / "models" / "stories260K.gguf"
    changes = random_changes(shapes_of(stories, head=False))
    assert_llama_cpp_agrees(stories, changes, tmp_path, F32_TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_gives_the_same_logits_on_every_architecture(tmp_path: Path, architecture: str) -> None:
    """All matrices, the head too, with mixed ranks and scales."""
    model = write_model(tmp_path, architecture)
    assert_llama_cpp_agrees(model, random_changes(shapes_of(model)), tmp_path, F32_TOLERANCE)


@pytest.mark.parametrize(
    "matrix", ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
)
def test_llama_cpp_gives_the_same_logits_with_an_edit_of_one_matrix(
    model: Path, tmp_path: Path, matrix: str
) -> None:
    shapes = {name: shape for name, shape in shapes_of(model).items() if name == f"blk.1.{matrix}.weight"}
    changes = random_changes(shapes, ranks=[1], scales=[1.0], gain=2.0)
    assert_llama_cpp_agrees(model, changes, tmp_path, F32_TOLERANCE)


def test_a_scale_that_alpha_can_carry_leaves_a_and_b_as_they_are(model: Path, tmp_path: Path) -> None:
    changes = random_changes(shapes_of(model), ranks=[3], scales=[0.25])
    path = written(tmp_path / "adapter.gguf", changes, model)
    with GGUFFile(path) as file:
        assert file.get_float("adapter.lora.alpha") == 0.75
    for found, given_ in zip(read(path, model), changes, strict=True):
        assert (found.matrix, found.scale) == (given_.matrix, 0.25)
        assert np.array_equal(found.a, given_.a)
        assert np.array_equal(found.b, given_.b)
    assert_llama_cpp_agrees(model, changes, tmp_path, F32_TOLERANCE)


# --- writing and reading ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "scales"),
    [
        ([1], [1.0]),
        ([5], [0.3]),
        ([2], [1.0, 0.5]),
        ([1, 2, 3, 5, 8], [0.7, -3.0]),
        ([3], [0.0]),
        ([3], [0.3]),
        ([7, 1], [1e-3]),
    ],
)
def test_reading_undoes_writing(model: Path, tmp_path: Path, ranks: list[int], scales: list[float]) -> None:
    changes = random_changes(shapes_of(model), ranks=ranks, scales=scales)
    found = read(written(tmp_path / "adapter.gguf", changes, model), model)
    assert [change.matrix for change in found] == [change.matrix for change in changes]
    for mine, given_ in zip(found, changes, strict=True):
        wanted = product(given_)
        # A scale is kept to the last bit, or is one that rounds nothing.
        assert np.float32(mine.scale) == np.float32(given_.scale) or np.frexp(mine.scale)[0] == 0.5
        # Each number of B was rounded once: half a unit in the last place of float32.
        bound = 2.0**-24 * np.abs(given_.scale) * np.abs(given_.b) @ np.abs(given_.a)
        assert (np.abs(product(mine) - wanted) <= 1.01 * bound).all()
        assert mine.a.shape[0] in (given_.a.shape[0], 1 << (given_.a.shape[0] - 1).bit_length())


def test_scales_that_are_powers_of_two_are_exact_whatever_the_ranks(model: Path, tmp_path: Path) -> None:
    changes = random_changes(shapes_of(model), ranks=[1, 3, 8, 5], scales=[1.0, 0.5, -4.0])
    for mine, given_ in zip(read(written(tmp_path / "a.gguf", changes, model), model), changes, strict=True):
        assert np.array_equal(product(mine), product(given_))


def test_changes_come_in_the_models_order_and_several_of_a_matrix_become_one(
    model: Path, tmp_path: Path
) -> None:
    shapes = {DOWN: (96, 64)}
    first, second = (
        random_changes(shapes, scales=[0.5])[0],
        random_changes(shapes, ranks=[3], scales=[2.0])[0],
    )
    query = random_changes({"blk.0.attn_q.weight": (64, 64)}, ranks=[4], scales=[1.0])[0]
    found = read(written(tmp_path / "adapter.gguf", [first, query, second], model), model)
    assert [change.matrix for change in found] == ["blk.0.attn_q.weight", DOWN]
    assert found[1].a.shape == (4, 96)
    assert np.allclose(product(found[1]), product(first) + product(second), rtol=0, atol=1e-7)


def test_the_file_says_what_it_is_to_other_readers(model: Path, tmp_path: Path) -> None:
    changes = random_changes({DOWN: (96, 64)}, ranks=[2], scales=[1.5])
    path = tmp_path / "adapter.gguf"
    with GGUFFile(model) as gguf:
        write_lora_gguf(path, changes, gguf, "Østerbro")
    reader = second_opinion.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "Østerbro",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }
    assert [tensor.name for tensor in reader.tensors] == [f"{DOWN}.lora_a", f"{DOWN}.lora_b"]
    a, b = (tensor.data for tensor in reader.tensors)
    assert np.array_equal(a, changes[0].a)
    assert np.array_equal(b, changes[0].b)


def foreign_file(path: Path, dtype: Any, alpha: float | None, b_axes: tuple[int, ...] = (64, 2)) -> LowRank:
    """What another program writes, and what is in it."""
    writer = second_opinion.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_string("general.base_model.0.name", "whatever")
    (change,) = random_changes({DOWN: (96, 64)}, ranks=[2], scales=[1.0])
    a, b = change.a, change.b
    if dtype == "BF16":
        a, b = ((values.view(np.uint32) >> 16).astype(np.uint16) for values in (a, b))
        raw: Any = second_opinion.GGMLQuantizationType.BF16
        writer.add_tensor(f"{DOWN}.lora_a", a.view(np.uint8), raw_dtype=raw)
        writer.add_tensor(f"{DOWN}.lora_b", b.view(np.uint8), raw_dtype=raw)
        a, b = ((values.astype(np.uint32) << 16).view(np.float32) for values in (a, b))
    else:
        writer.add_tensor(f"{DOWN}.lora_a", a.astype(dtype))
        writer.add_tensor(f"{DOWN}.lora_b", b.astype(dtype).reshape(b_axes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LowRank(DOWN, a, b)


@pytest.mark.parametrize(
    ("dtype", "alpha"), [(np.float32, 16.0), (np.float16, 3.0), ("BF16", 0.0), (np.float32, None)]
)
def test_what_other_programs_write_is_read_as_llama_cpp_reads_it(
    model: Path, tmp_path: Path, dtype: Any, alpha: float | None
) -> None:
    path = tmp_path / "foreign.gguf"
    wanted = foreign_file(path, dtype, alpha)
    (found,) = read(path, model)
    assert found.scale == (alpha / 2 if alpha else 1.0)
    assert found.a.dtype == found.b.dtype == np.float32
    precision = 1e-3 if dtype is np.float16 else 0.0
    assert np.allclose(found.a, wanted.a, rtol=precision, atol=1e-4 * precision)
    assert np.allclose(found.b, wanted.b, rtol=precision, atol=1e-4 * precision)
    theirs = llama_cpp_logits(model, path)
    assert np.abs(logits_with(model, [found]) - theirs).max() <= F32_TOLERANCE * np.ptp(theirs)


# --- what is refused --------------------------------------------------------------------------

_GOOD = random_changes({DOWN: (96, 64)}, ranks=[2])[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([], "at least one low-rank change"),
        ([replace(_GOOD, matrix="blk.2.ffn_down.weight")], "no matrix 'blk.2.ffn_down.weight'"),
        ([replace(_GOOD, matrix="token_embd.weight")], "no matrix 'token_embd.weight' that can be changed"),
        ([replace(_GOOD, matrix="output_norm.weight")], "no matrix"),
        ([replace(_GOOD, matrix="blk.1.ffn_up.weight")], r"A \(2, 96\) and B \(64, 2\) do not fit"),
        ([replace(_GOOD, b=_GOOD.b[:, :1])], "do not fit"),
        ([replace(_GOOD, a=_GOOD.a[:0], b=_GOOD.b[:, :0])], "do not fit"),
        ([replace(_GOOD, scale=float("inf"))], "not finite"),
        ([_GOOD, replace(_GOOD, a=_GOOD.a * np.float32("nan"))], "not finite"),
        ([replace(_GOOD, scale=1e41)], "leaves the range of float32"),
    ],
)
def test_what_does_not_fit_the_model_is_not_written(
    model: Path, tmp_path: Path, changes: list[LowRank], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        written(tmp_path / "adapter.gguf", changes, model)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_not_written_for_llama_cpp(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", tied_head=True)
    with pytest.raises(RequestError, match=r"no output.weight of its own.*export this adapter as PEFT"):
        written(tmp_path / "adapter.gguf", random_changes(shapes_of(model)), model)


def test_writing_replaces_in_one_step_and_is_private(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "adapter.gguf", [_GOOD], model)
    before = path.read_bytes()
    with pytest.raises(RequestError):
        written(path, [replace(_GOOD, scale=1e41)], model)
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600
    written(path, [_GOOD, _GOOD], model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter.gguf"]
    assert path.read_bytes() != before


def text(value: str) -> bytes:
    return b"\x08\0\0\0" + string(value.encode())


def with_pair(key: str, value: bytes | None) -> Any:
    def change(parts: Parts) -> None:
        parts.pairs = [pair for pair in parts.pairs if pair[0] != key.encode()]
        if value is not None:
            parts.pairs.append((key.encode(), value))

    return change


def with_tensor(index: int, **values: Any) -> Any:
    def change(parts: Parts) -> None:
        for name, value in values.items():
            setattr(parts.tensors[index], name, value)

    return change


_REFUSED: dict[str, tuple[Any, str]] = {
    "a model": (with_pair("general.type", None), "general.type is '', needed is 'adapter'"),
    "a control vector": (with_pair("adapter.type", text("cvec")), "adapter.type is 'cvec', needed is 'lora'"),
    "another architecture": (
        with_pair("general.architecture", text("qwen2")),
        "is 'qwen2', needed is 'llama'",
    ),
    "a type of number": (
        with_pair("general.type", scalar(4, 1)),
        "general.type is uint32; a string is needed",
    ),
    "no number for alpha": (with_pair("adapter.lora.alpha", text("8")), "alpha is string"),
    "alpha without end": (with_pair("adapter.lora.alpha", scalar(6, float("inf"))), "alpha is inf"),
    "alpha too large": (with_pair("adapter.lora.alpha", scalar(12, 1e60)), "not finite"),
    "activation by tokens": (
        with_pair("adapter.alora.invocation_tokens", b"\x09\0\0\0\x04\0\0\0" + bytes(8)),
        "only behind certain tokens",
    ),
    "a part alone": (lambda parts: parts.tensors.pop(), rf"'{DOWN}' has .lora_a alone; .lora_a and .lora_b"),
    "the other part alone": (lambda parts: parts.tensors.pop(0), "has .lora_b alone"),
    "nothing": (lambda parts: parts.tensors.clear(), "changes nothing"),
    "a part twice": (lambda parts: parts.tensors.append(parts.tensors[0]), "occurs twice"),
    "a norm": (
        with_tensor(0, name=b"output_norm.weight"),
        "'output_norm.weight' is no part of a low-rank change",
    ),
    "another matrix": (
        lambda parts: [
            setattr(tensor, "name", tensor.name.replace(b"blk.1", b"blk.7")) for tensor in parts.tensors
        ],
        "no matrix 'blk.7.ffn_down.weight' that can be changed; is it an adapter of llama.gguf",
    ),
    "another width": (with_tensor(0, shape=[48, 4]), r"A \(4, 48\) and B \(64, 2\) do not fit"),
    "another rank": (with_tensor(1, shape=[4, 32]), "do not fit"),
    "three axes": (with_tensor(0, shape=[96, 1, 2]), r"has the shape \(96, 1, 2\); a matrix is needed"),
    "whole numbers": (with_tensor(0, type=26), "quantized; convert the adapter with F32, F16 or BF16"),
    "no number in A": (with_tensor(0, content=b"\0\0\xc0\x7f" * 192), "not finite"),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_what_is_no_lora_of_this_model_is_refused(model: Path, tmp_path: Path, kind: str) -> None:
    change, says = _REFUSED[kind]
    path = written(tmp_path / "adapter.gguf", [_GOOD], model)
    parts = take_apart(path)
    change(parts)
    path.write_bytes(parts.encode())
    with pytest.raises(AdapterFileError, match=says) as caught:
        read(path, model)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_or_no_gguf_are_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no file"):
        read(tmp_path / "none.gguf", model)
    with pytest.raises(AdapterFileError, match="is a folder"):
        read(tmp_path, model)
    (tmp_path / "text").write_text("this is no adapter at all, but text")
    with pytest.raises(AdapterFileError, match=r"a GGUF file starts with .*this is no sound GGUF LoRA"):
        read(tmp_path / "text", model)
    with pytest.raises(AdapterFileError, match=r"general.type is '', needed is 'adapter'"):
        read(model, model)


@pytest.fixture(scope="module")
def bases(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Parts]:
    folder = tmp_path_factory.mktemp("bases")
    small, large = [_GOOD], random_changes(shapes_of(model))
    found = [take_apart(written(folder / "base.gguf", changes, model)) for changes in (small, large)]
    half = take_apart(folder / "base.gguf")
    half.tensors = [
        Tensor(tensor.name, tensor.shape, 1, np.frombuffer(tensor.content, "<f4").astype("<f2").tobytes())
        for tensor in half.tensors
    ]
    return [*found, half]


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_gives_anything_but_a_clear_error_or_sound_changes(
    model: Path, bases: list[Parts], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged_file(data.draw, bases))
    shapes = shapes_of(model)
    try:
        found = read(path, model)
    except AdapterFileError:
        return
    assert found
    for change in found:
        n_in, n_out = shapes[change.matrix]
        assert change.a.shape[1:] == (n_in,)
        assert change.b.shape == (n_out, len(change.a))
        assert np.isfinite(change.a).all()
        assert np.isfinite(change.b).all()
        assert np.isfinite(change.scale)
