"""Reading hyperparameters as llama.cpp does, and refusing what the engine does not compute."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from model_damage import Parts, Tensor, scalar, string, strings, take_apart

from edge_runtime.engine.architecture import (
    MULTIPLIED_TYPES,
    Hyperparameters,
    check_tensors,
    read_hyperparameters,
)
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGML_TYPES, GGUFFile
from edge_runtime.engine.model import Model
from edge_runtime.errors import ModelFileError, UnsupportedModelError
from models.synthetic import RopeScaling, SyntheticModel, write_synthetic_gguf

BASE = SyntheticModel(n_embd=64, n_ff=96, n_head=4, n_head_kv=2, n_vocab=300, n_layers=3, n_ctx=256)


def text(value: str) -> bytes:
    return struct.pack("<I", 8) + string(value.encode())


def integers(*values: int) -> bytes:
    return struct.pack(f"<IIQ{len(values)}I", 9, 4, len(values), *values)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Hyperparameters]:
    """Hyperparameters of a synthetic model after changes to its pairs (None removes one) and tensors."""

    def read(
        model: SyntheticModel = BASE,
        pairs: dict[str, bytes | None] | None = None,
        change: Callable[[Parts], None] | None = None,
    ) -> Hyperparameters:
        path = tmp_path / "model.gguf"
        write_synthetic_gguf(path, model)
        parts = take_apart(path)
        for key, value in (pairs or {}).items():
            parts.pairs = [pair for pair in parts.pairs if pair[0] != key.encode()]
            if value is not None:
                parts.pairs.append((key.encode(), value))
        if change is not None:
            change(parts)
        path.write_bytes(parts.encode())
        with GGUFFile(path) as gguf:
            hyperparameters = read_hyperparameters(gguf)
            check_tensors(gguf, hyperparameters)
        return hyperparameters

    return read


Read = Callable[..., Hyperparameters]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_models_shape_is_read(read: Read, architecture: str) -> None:
    found = read(dataclasses.replace(BASE, architecture=architecture, head_dim=32, biases=True))
    assert found.architecture == architecture
    assert (found.n_layers, found.n_embd, found.n_ff, found.n_vocab) == (3, 64, 96, 300)
    assert (found.n_head, found.n_head_kv, found.head_dim, found.n_ctx_train) == (4, 2, 32, 256)
    assert found.norm_epsilon == pytest.approx(1e-5)
    assert found.attention_scale == pytest.approx(32**-0.5)
    assert found.rope.neox == (architecture != "llama")
    assert found.qk_norm == (architecture == "qwen3")
    assert not found.tied_head


def test_without_a_head_the_embedding_is_the_head(read: Read) -> None:
    assert read(dataclasses.replace(BASE, tied_head=True)).tied_head


def test_optional_keys_have_llama_cpps_defaults(read: Read) -> None:
    names = ["attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"]
    found = read(dataclasses.replace(BASE, n_head_kv=4), {f"llama.{name}": None for name in names})
    assert found.n_head_kv == 4
    assert found.rope.freq_base == 10000.0
    assert found.rope.n_ctx_orig == 256
    assert (found.rope.freq_scale, found.rope.ext_factor, found.rope.attn_factor) == (1.0, 0.0, 1.0)


def test_head_counts_for_each_layer_must_be_the_same(read: Read) -> None:
    assert read(pairs={"llama.attention.head_count": integers(4, 4, 4)}).n_head == 4
    with pytest.raises(UnsupportedModelError, match="layers of different shape"):
        read(pairs={"llama.attention.head_count_kv": integers(2, 1, 2)})
    with pytest.raises(ModelFileError, match="3 of them"):
        read(pairs={"llama.feed_forward_length": integers(96, 96)})


# --- rope ---------------------------------------------------------------------------------------


def test_linear_scaling_divides_the_frequencies(read: Read) -> None:
    found = read(dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 4.0))).rope
    assert (found.freq_scale, found.ext_factor, found.attn_factor) == (0.25, 0.0, 1.0)
    assert read(pairs={"llama.rope.scale_linear": scalar(6, 8.0)}).rope.freq_scale == 0.125


def test_scaling_none_ignores_the_factor(read: Read) -> None:
    assert read(dataclasses.replace(BASE, rope_scaling=RopeScaling("none", 4.0))).rope.freq_scale == 1.0


def test_yarn_is_switched_on(read: Read) -> None:
    scaling = RopeScaling("yarn", 4.0, original_context=64, attn_factor=0.5)
    found = read(dataclasses.replace(BASE, rope_scaling=scaling)).rope
    assert (found.freq_scale, found.ext_factor, found.n_ctx_orig) == (0.25, 1.0, 64)
    assert found.attn_factor == pytest.approx(0.5)
    assert (found.beta_fast, found.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("none", 4.0)},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_context=64)},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_context=64, attn_factor=0.7)},
        {"rope_scaling": RopeScaling("yarn", 0.5)},
        {"rope_scaling": RopeScaling("linear", 2.0, attn_factor=1.3)},
        {"rope_factors": True, "rope_base": 500000.0},
        {"architecture": "qwen2", "rope_scaling": RopeScaling("yarn", 4.0, 64), "biases": True},
        {"architecture": "qwen3", "rope_scaling": RopeScaling("yarn", 4.0, 64), "head_dim": 32},
    ],
)
def test_logits_far_into_the_context_are_llama_cpps(tmp_path: Path, change: dict[str, object]) -> None:
    import llama_cpp

    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, dataclasses.replace(BASE, **change))  # type: ignore[arg-type]
    tokens = np.random.default_rng(5).integers(3, 300, 150).tolist()
    oracle = llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, flash_attn=True, n_threads=1
    )
    oracle.eval(tokens)
    wanted = np.array(oracle.scores[: len(tokens)])
    oracle.close()
    with GGUFFile(path) as gguf:
        model = Model(gguf, read_hyperparameters(gguf), n_cells=256, n_sequences=1, threads=1)
        found = model.forward(Batch(tokens, list(range(len(tokens))))).logits
        model.close()
    assert np.abs(found - wanted).max() <= 1e-3 * np.ptp(wanted)


def test_longrope_is_unsupported(read: Read) -> None:
    with pytest.raises(UnsupportedModelError, match="longrope"):
        read(dataclasses.replace(BASE, rope_scaling=RopeScaling("longrope", 4.0)))


@pytest.mark.parametrize("factor", [-1.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_senseless_scaling_factors_are_refused(read: Read, factor: float) -> None:
    with pytest.raises(ModelFileError, match=r"scaling\.factor"):
        read(dataclasses.replace(BASE, rope_scaling=RopeScaling("yarn", factor)))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({"general.architecture": text("gemma3")}, "has the architecture 'gemma3'; .* llama, qwen2, qwen3"),
        ({"general.type": text("adapter")}, "holds a 'adapter'"),
        ({"split.count": scalar(2, 3)}, "one of 3 parts"),
        ({"llama.expert_count": scalar(4, 8)}, "llama.expert_count = 8"),
        ({"llama.attention.sliding_window": scalar(4, 128)}, "sliding_window = 128"),
        ({"llama.attention.causal": scalar(7, 0)}, "causal = False"),
        ({"llama.attention.scale": scalar(6, 0.1)}, "attention.scale"),
        ({"llama.logit_scale": scalar(6, 0.5)}, "logit_scale"),
        ({"llama.attention.value_length": scalar(4, 8)}, "keys 16 wide and values 8 wide"),
        ({"llama.rope.dimension_count": scalar(4, 8)}, "rotates 8 of 16"),
    ],
)
def test_variants_that_compute_something_else_are_unsupported(
    read: Read, pairs: dict[str, bytes | None], says: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        read(pairs=pairs)


def test_keys_that_change_nothing_are_accepted(read: Read) -> None:
    pairs = {
        "expert_count": scalar(4, 0),
        "attention.causal": scalar(7, 1),
        "attention.scale": scalar(6, 0.25),
    }
    assert read(pairs={f"llama.{name}": value for name, value in pairs.items()})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("block_count", scalar(4, 0), "block_count is 0; 1 to 1024"),
        ("block_count", scalar(4, 2**31), "1 to 1024"),
        ("block_count", None, "block_count is nothing"),
        ("block_count", text("3"), "block_count is string; an integer"),
        ("embedding_length", scalar(10, 2**63), "embedding_length is 9223372036854775808"),
        ("attention.head_count", scalar(4, 0), "head_count is 0"),
        ("attention.head_count", scalar(5, -4), "head_count is -4"),
        ("attention.head_count_kv", scalar(4, 0), "head_count_kv is 0"),
        ("attention.head_count_kv", scalar(4, 3), "4 attention heads cannot share 3"),
        ("attention.head_count_kv", scalar(4, 8), "head_count_kv is 8; 1 to 4"),
        ("attention.layer_norm_rms_epsilon", scalar(6, -1.0), "epsilon is -1.0"),
        ("attention.layer_norm_rms_epsilon", scalar(6, float("nan")), "epsilon is nan"),
        ("attention.layer_norm_rms_epsilon", None, "epsilon is nothing"),
        ("context_length", scalar(4, 0), "context_length is 0"),
        ("rope.freq_base", scalar(6, 0.0), "freq_base is 0.0"),
        ("feed_forward_length", scalar(4, 97), "ffn_gate.weight has the shape"),
        ("embedding_length", scalar(4, 66), "token_embd[.]weight has the shape"),
    ],
)
def test_contradictions_are_refused(read: Read, name: str, value: bytes | None, says: str) -> None:
    with pytest.raises(ModelFileError, match=says) as caught:
        read(pairs={f"llama.{name}": value})
    assert type(caught.value) is ModelFileError


def test_odd_heads_are_refused(read: Read) -> None:
    with pytest.raises(ModelFileError, match="heads are 15 wide; an even number"):
        read(dataclasses.replace(BASE, head_dim=15))


def test_the_vocabulary_must_fit_the_embedding(read: Read) -> None:
    with pytest.raises(ModelFileError, match=r"2 tokens, token_embd\.weight has 300 rows"):
        read(pairs={"tokenizer.ggml.tokens": strings([b"a", b"b"])})


def drop(name: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors = [tensor for tensor in parts.tensors if tensor.name != name.encode()]

    return change


def add(name: str, *shape: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensors.append(Tensor(name.encode(), list(shape), 0, bytes(4 * int(np.prod(shape)))))

    return change


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.ffn_down.weight", "blk.2.attn_v.weight"])
def test_missing_tensors_are_named(read: Read, name: str) -> None:
    with pytest.raises(ModelFileError, match=f"lacks 1 of 30 tensors \\({name}"):
        read(change=drop(name))


def test_a_model_without_embedding_is_refused(read: Read) -> None:
    with pytest.raises(ModelFileError, match=r"no tensor token_embd\.weight"):
        read(change=drop("token_embd.weight"))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.scale",
        "blk.0.ffn_gate_inp.weight",
        "output.bias",
        "blk.3.attn_norm.weight",
        "cls.weight",
    ],
)
def test_tensors_that_would_be_left_out_are_unsupported(read: Read, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"a tensor '{name}'"):
        read(change=add(name, 1))


def test_rope_factors_are_llamas_alone(read: Read) -> None:
    assert read(change=add("rope_freqs.weight", 8))
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight has the shape"):
        read(change=add("rope_freqs.weight", 9))
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        read(dataclasses.replace(BASE, architecture="qwen3"), change=add("rope_freqs.weight", 8))


def test_fused_queries_keys_and_values_are_named(read: Read) -> None:
    def fuse(parts: Parts) -> None:
        drop("blk.0.attn_q.weight")(parts)
        add("blk.0.attn_qkv.weight", 64, 128)(parts)

    with pytest.raises(UnsupportedModelError, match="in one matrix"):
        read(change=fuse)


def retype(name: str, type_: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        tensor = next(tensor for tensor in parts.tensors if tensor.name == name.encode())
        kind = GGML_TYPES[type_]
        tensor.type = type_
        tensor.content = bytes(int(np.prod(tensor.shape)) // kind.block_size * kind.block_bytes)

    return change


@pytest.mark.parametrize("type_", [number for number in GGML_TYPES if number not in MULTIPLIED_TYPES])
def test_types_that_cannot_be_multiplied_are_unsupported(read: Read, type_: int) -> None:
    model = dataclasses.replace(BASE, n_embd=256, n_ff=256)
    with pytest.raises(UnsupportedModelError, match=f"the type {GGML_TYPES[type_].name}"):
        read(model, change=retype("blk.0.ffn_down.weight", type_))


def test_norms_must_be_f32(read: Read) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ffn_norm\.weight has the type F16; F32 is needed"):
        read(change=retype("blk.0.ffn_norm.weight", 1))


@pytest.mark.parametrize("quantization", sorted(GGML_TYPES[number].name for number in MULTIPLIED_TYPES))
def test_every_type_with_kernels_is_accepted(read: Read, quantization: str) -> None:
    number = next(number for number, kind in GGML_TYPES.items() if kind.name == quantization)
    model = dataclasses.replace(BASE, n_embd=256, n_ff=256, n_layers=1)
    assert read(model, change=retype("blk.0.ffn_up.weight", number))
    assert read(model, change=retype("token_embd.weight", number))
