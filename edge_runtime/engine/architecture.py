"""What a GGUF says about its model, and whether the engine can run it.

The keys are read, and the rotary embedding's parameters computed, as llama.cpp does for the same file
(src/llama-model.cpp, src/llama-context.cpp), so that both give the same logits. ggml aborts the process
where a precondition of an operation fails; whatever the graph relies on is therefore checked here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.gguf import GGML_TYPES, GGUFFile
from edge_runtime.errors import ModelFileError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Bounds far above any real model, so that no later product leaves 64 bits.
_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_FFN_WIDTH = 1 << 22
_MAX_HEADS = 1 << 14
_MAX_HEAD_DIM = 1024  # attention takes scratch memory in proportion
_MAX_VOCABULARY = 1 << 21
_MAX_POSITIONS = (1 << 31) - 1

_F32 = 0
# ggml_type numbers that the CPU backend has a dot product and a row look-up for: all but the formats
# it only uses for activations (Q8_1, Q8_K) and plain integers and doubles.
MULTIPLIED_TYPES = frozenset(
    number
    for number, kind in GGML_TYPES.items()
    if kind.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)

# Keys under the architecture's name that change what a model computes, with the values that do not.
_NEUTRAL: Mapping[str, Collection[object]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
}


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """What ggml_rope_ext is given. `neox`: halves of a head are rotated together, else neighbours.

    YaRN (https://arxiv.org/abs/2309.00071) is on where `ext_factor` is not 0; `beta_fast` and `beta_slow`
    are its rotation counts, `n_ctx_orig` the context length before stretching, in tokens.
    """

    n_dims: int
    neox: bool
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    n_ctx_orig: int


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Shape of a LLaMA-family model.

    Attributes:
        n_head_kv: heads of keys and values; divides `n_head`.
        head_dim: width of one head, even; queries are n_head * head_dim wide, which need not be n_embd.
        n_ctx_train: the longest context it was made for, in tokens.
        norm_epsilon: of every RMS norm.
        tied_head: the LM head is the embedding matrix.
        attention_scale: dot products of queries and keys are multiplied by it.
        qk_norm: queries and keys are normalised head by head before rotation.
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    norm_epsilon: float
    rope: RopeParameters
    tied_head: bool
    attention_scale: float
    qk_norm: bool


def read_hyperparameters(gguf: GGUFFile) -> Hyperparameters:
    """The model's hyperparameters, checked against each other and against what the engine computes.

    Raises:
        ModelFileError: a key is missing, of a wrong type, out of range or contradicts another.
        UnsupportedModelError: another architecture, or a variant that computes something else.
    """
    architecture = _architecture(gguf)
    n_layers = gguf.get_int(f"{architecture}.block_count", minimum=1, maximum=_MAX_LAYERS)
    _refuse_variants(gguf, architecture)
    n_embd = gguf.get_int(f"{architecture}.embedding_length", minimum=1, maximum=_MAX_WIDTH)
    key = f"{architecture}.attention.head_count"
    n_head = _same_in_all_layers(gguf, key, n_layers, maximum=_MAX_HEADS)
    n_head_kv = n_head
    if f"{key}_kv" in gguf.metadata:
        n_head_kv = _same_in_all_layers(gguf, f"{key}_kv", n_layers, maximum=n_head)
    if n_head % n_head_kv:
        raise ModelFileError(
            f"{gguf.path}: {n_head} attention heads cannot share {n_head_kv} key-value heads evenly"
        )
    head_dim = _head_dim(gguf, architecture, n_embd // n_head)
    n_ctx = gguf.get_int(f"{architecture}.context_length", minimum=1, maximum=_MAX_POSITIONS)
    return Hyperparameters(
        architecture=architecture,
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=_same_in_all_layers(
            gguf, f"{architecture}.feed_forward_length", n_layers, maximum=_MAX_FFN_WIDTH
        ),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_vocabulary_size(gguf, architecture),
        n_ctx_train=n_ctx,
        norm_epsilon=gguf.get_float(
            f"{architecture}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0
        ),
        rope=_rope(gguf, architecture, head_dim, n_ctx),
        tied_head="output.weight" not in gguf.tensors,
        attention_scale=_attention_scale(gguf, architecture, head_dim),
        qk_norm=architecture == "qwen3",
    )


def _unsupported(gguf: GGUFFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{gguf.path} {what}; the engine runs dense models of the architectures {', '.join(ARCHITECTURES)}: "
        "choose another model"
    )


def _architecture(gguf: GGUFFile) -> str:
    kind = gguf.get_str("general.type", "model")
    if kind != "model":
        raise _unsupported(gguf, f"holds a {kind!r}, not a model")
    n_parts = gguf.get_int("split.count", 1)
    if n_parts > 1:
        raise UnsupportedModelError(
            f"{gguf.path} is one of {n_parts} parts of a model; join them with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    architecture = gguf.get_str("general.architecture")
    if architecture not in ARCHITECTURES:
        raise _unsupported(gguf, f"has the architecture {architecture[:64]!r}")
    return architecture


def _refuse_variants(gguf: GGUFFile, architecture: str) -> None:
    for name, neutral in _NEUTRAL.items():
        key = f"{architecture}.{name}"
        value = gguf.metadata.get(key)
        if value is None:
            continue
        values = value.tolist() if isinstance(value, np.ndarray) else [value]
        if not all(isinstance(item, bool | int | float) and item in neutral for item in values):
            raise _unsupported(gguf, f"has {key} = {str(value)[:64]}, which is not implemented")


def _same_in_all_layers(gguf: GGUFFile, key: str, n_layers: int, *, maximum: int) -> int:
    """An integer that llama.cpp also takes as an array with one element for each layer."""
    if not gguf.type_name(key).startswith("array"):
        return gguf.get_int(key, minimum=1, maximum=maximum)
    values = gguf.get_array(key)
    if values.dtype.kind not in "iu" or len(values) < n_layers:
        raise ModelFileError(
            f"{gguf.path}: {key} is an {gguf.type_name(key)}; one integer or {n_layers} of them are needed"
        )
    first = int(values[0])
    if np.any(values[:n_layers] != values[0]):
        raise _unsupported(gguf, f"has layers of different shape ({key})")
    if not 1 <= first <= maximum:
        raise ModelFileError(f"{gguf.path}: {key} is {first}; 1 to {maximum} is needed")
    return first


def _head_dim(gguf: GGUFFile, architecture: str, default: int) -> int:
    prefix = f"{architecture}.attention"
    head_dim = gguf.get_int(f"{prefix}.key_length", default)
    value_dim = gguf.get_int(f"{prefix}.value_length", default)
    rotated = gguf.get_int(f"{architecture}.rope.dimension_count", head_dim)
    if value_dim != head_dim:
        raise _unsupported(gguf, f"has keys {head_dim} wide and values {value_dim} wide")
    if not 2 <= head_dim <= _MAX_HEAD_DIM or head_dim % 2:
        raise ModelFileError(
            f"{gguf.path}: attention heads are {head_dim} wide; "
            f"an even number from 2 to {_MAX_HEAD_DIM} is needed"
        )
    if rotated != head_dim:
        raise _unsupported(gguf, f"rotates {rotated} of {head_dim} dimensions of a head")
    return head_dim


def _vocabulary_size(gguf: GGUFFile, architecture: str) -> int:
    record = gguf.tensors.get("token_embd.weight")
    if record is None:
        raise ModelFileError(f"{gguf.path} has no tensor token_embd.weight; give a complete model file")
    n_vocab = record.shape[1] if len(record.shape) == 2 else 0
    if not 1 <= n_vocab <= _MAX_VOCABULARY:
        raise ModelFileError(
            f"{gguf.path}: token_embd.weight has the shape {record.shape}; "
            f"two axes and 1 to {_MAX_VOCABULARY} tokens are needed"
        )
    n_tokens = gguf.array_length("tokenizer.ggml.tokens")
    if n_tokens != n_vocab:
        raise ModelFileError(
            f"{gguf.path}: the vocabulary has {n_tokens} tokens, token_embd.weight has {n_vocab} rows"
        )
    return n_vocab


def _attention_scale(gguf: GGUFFile, architecture: str, head_dim: int) -> float:
    usual = float(np.float32(1.0) / np.sqrt(np.float32(head_dim)))
    key = f"{architecture}.attention.scale"
    scale = gguf.get_float(key, 0.0)
    if scale != 0.0 and not math.isclose(scale, usual, rel_tol=1e-6):
        raise _unsupported(gguf, f"has {key} = {scale}, which is not implemented")
    return usual


def _rope(gguf: GGUFFile, architecture: str, head_dim: int, n_ctx: int) -> RopeParameters:
    """Parameters of the rotary embedding, in float32 arithmetic where llama.cpp uses it."""
    prefix = f"{architecture}.rope"
    scaling = gguf.get_str(f"{prefix}.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise _unsupported(gguf, f"has the rope scaling {scaling[:64]!r} (none, linear and yarn are known)")
    key = f"{prefix}.scaling.factor"
    factor = gguf.get_float(key if key in gguf.metadata else f"{prefix}.scale_linear", 0.0)
    if factor != 0.0 and not 2**-6 <= factor <= 2**20:
        raise ModelFileError(f"{gguf.path}: {key} is {factor}; {2**-6} to {2**20} is needed")
    one = np.float32(1.0)
    freq_scale = one if factor == 0.0 or scaling == "none" else one / np.float32(factor)
    attn_factor = one
    if scaling == "yarn":
        stretch = one / freq_scale
        correction = np.float32(0.1) * np.log(stretch)
        # ggml multiplies by 1 + 0.1 ln(stretch) itself; llama.cpp divides it out again, and so it
        # stays 1 except for rounding and for models that were made shorter.
        attn_factor = (one + correction if stretch > 1 else one) * (one / (one + correction))
    trained_factor = gguf.get_float(f"{prefix}.scaling.attn_factor", 1.0, minimum=-1e4, maximum=1e4)
    n_ctx_orig = gguf.get_int(
        f"{prefix}.scaling.original_context_length", n_ctx, minimum=0, maximum=_MAX_POSITIONS
    )
    return RopeParameters(
        n_dims=head_dim,
        neox=architecture != "llama",
        freq_base=gguf.get_float(f"{prefix}.freq_base", 10000.0, minimum=1.0, maximum=1e15),
        freq_scale=float(freq_scale),
        ext_factor=1.0 if scaling == "yarn" else 0.0,
        attn_factor=float(attn_factor * np.float32(trained_factor)),
        beta_fast=32.0,
        beta_slow=1.0,
        n_ctx_orig=n_ctx_orig or n_ctx,
    )


def _needed(hp: Hyperparameters) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (ggml's order of axes) of the tensors that the model must have."""
    queries, keys = hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim
    yield "token_embd.weight", (hp.n_embd, hp.n_vocab)
    yield "output_norm.weight", (hp.n_embd,)
    if not hp.tied_head:
        yield "output.weight", (hp.n_embd, hp.n_vocab)
    for layer in range(hp.n_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hp.n_embd,)
        yield f"{block}.attn_q.weight", (hp.n_embd, queries)
        yield f"{block}.attn_k.weight", (hp.n_embd, keys)
        yield f"{block}.attn_v.weight", (hp.n_embd, keys)
        yield f"{block}.attn_output.weight", (queries, hp.n_embd)
        yield f"{block}.ffn_norm.weight", (hp.n_embd,)
        yield f"{block}.ffn_gate.weight", (hp.n_embd, hp.n_ff)
        yield f"{block}.ffn_up.weight", (hp.n_embd, hp.n_ff)
        yield f"{block}.ffn_down.weight", (hp.n_ff, hp.n_embd)
        if hp.qk_norm:
            yield f"{block}.attn_q_norm.weight", (hp.head_dim,)
            yield f"{block}.attn_k_norm.weight", (hp.head_dim,)


def _optional(hp: Hyperparameters) -> Iterator[tuple[str, tuple[int, ...]]]:
    if hp.architecture == "llama":
        yield "rope_freqs.weight", (hp.head_dim // 2,)
    widths = {
        "attn_q": hp.n_head * hp.head_dim,
        "attn_k": hp.n_head_kv * hp.head_dim,
        "attn_v": hp.n_head_kv * hp.head_dim,
        "attn_output": hp.n_embd,
        "ffn_gate": hp.n_ff,
        "ffn_up": hp.n_ff,
        "ffn_down": hp.n_embd,
    }
    for layer in range(hp.n_layers):
        for kind, width in widths.items():
            yield f"blk.{layer}.{kind}.bias", (width,)


def check_tensors(gguf: GGUFFile, hyperparameters: Hyperparameters) -> None:
    """Check that the file has every tensor the engine computes with, and none it would leave out.

    Matrices have a type the CPU backend multiplies, vectors (norms, biases, rope factors) are F32.

    Raises:
        ModelFileError: a tensor is missing or has a wrong shape.
        UnsupportedModelError: a type without kernels, or a tensor that no part of the engine uses.
    """
    shapes = dict(_needed(hyperparameters))
    missing = [name for name in shapes if name not in gguf.tensors]
    fused = [name for name in missing if name.endswith("attn_q.weight")]
    if fused and fused[0].replace("attn_q.", "attn_qkv.") in gguf.tensors:
        raise _unsupported(gguf, "stores queries, keys and values in one matrix (attn_qkv)")
    if missing:
        raise ModelFileError(
            f"{gguf.path} lacks {len(missing)} of {len(shapes)} tensors ({', '.join(missing[:3])}, ...); "
            "give a complete model file"
        )
    shapes |= _optional(hyperparameters)
    for name, record in gguf.tensors.items():
        shape = shapes.get(name)
        if shape is None:
            raise _unsupported(gguf, f"has a tensor {name!r}, which a {hyperparameters.architecture} lacks")
        if record.shape != shape:
            raise ModelFileError(
                f"{gguf.path}: {name} has the shape {record.shape}; the metadata needs {shape}"
            )
        if len(shape) == 1 and record.type != _F32:
            raise UnsupportedModelError(
                f"{gguf.path}: {name} has the type {GGML_TYPES[record.type].name}; F32 is needed"
            )
        if record.type not in MULTIPLIED_TYPES:
            raise UnsupportedModelError(
                f"{gguf.path}: {name} has the type {GGML_TYPES[record.type].name}, which cannot be "
                "multiplied; choose another quantization of the model"
            )
