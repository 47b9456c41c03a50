"""GGUF files with random weights, of any shape and quantization, for tests and for measuring speed.

The weights are scaled so that activations stay of the order of one and logits differ clearly. The
vocabulary is SentencePiece-like with all 256 bytes, so any text can be encoded. Large files are written
in seconds: the rows of their matrices are drawn from a pool of quantized random rows.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.gguf import GGML_TYPES

_ALIGNMENT = 32
_POOL_ELEMENTS = 1 << 22  # per row length and type; beyond it rows repeat
_SLOW_POOL_ELEMENTS = 1 << 15  # of types below 4 bits, whose codes are found by search: 10 us an element
_HEAD_GAIN = 4.0  # standard deviation of the logits
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_UNKNOWN, _CONTROL, _BYTE, _NORMAL = 2, 3, 6, 1
_LETTERS = "▁abcdefghijklmnopqrstuvwxyz"

_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
# What llama.cpp's quantizer takes where a row is no multiple of the block.
_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q2_0": "Q4_0",
}
# Mixes: type of most matrices, type of attn_v and ffn_down in layers that get more bits.
_MIXES = {"Q4_K_M": ("Q4_K", "Q6_K"), "Q5_K_M": ("Q5_K", "Q6_K")}
_FLOATING = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class RopeScaling:
    """Metadata of a stretched rotary embedding; None leaves a key out."""

    type: Literal["none", "linear", "yarn", "longrope"]
    factor: float | None = None
    original_context: int | None = None
    attn_factor: float | None = None


@dataclass(frozen=True)
class SyntheticModel:
    """Shape of a random model.

    Attributes:
        head_dim: None: n_embd / n_head, and no key says so.
        n_vocab: at least 259.
        quantization: name of a ggml type or of the mixes Q4_K_M and Q5_K_M. A matrix whose rows do not
            fit gets what llama.cpp's quantizer gives it; vectors are F32.
        pure: the LM head has that type too, not Q6_K or Q8_0 as llama.cpp's quantizer chooses.
        tied_head: no output.weight.
        biases: of queries, keys and values (qwen2 has them).
        all_biases: of the other matrices too (llama only).
        rope_factors: a tensor rope_freqs.weight, as Llama 3.1 has (llama only).
        pre_tokenizer: None writes a SentencePiece-like vocabulary, a name (such as ``qwen2``) one of byte
            pairs that libllama cuts by the rule of that name.
        extra_tensors: names and shapes (ggml's order of axes) of further F32 tensors.
    """

    architecture: str = "llama"
    n_layers: int = 2
    n_embd: int = 64
    n_ff: int = 192
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int | None = None
    n_vocab: int = 300
    n_ctx: int = 512
    quantization: str = "F32"
    pure: bool = False
    tied_head: bool = False
    biases: bool = False
    all_biases: bool = False
    rope_scaling: RopeScaling | None = None
    rope_factors: bool = False
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    chat_template: str | None = None
    pre_tokenizer: str | None = None
    extra_tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    seed: int = 0

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def size(self) -> int:
        kind = GGML_TYPES[self.type]
        return int(np.prod(self.shape, dtype=object)) // kind.block_size * kind.block_bytes


def write_synthetic_gguf(path: str | os.PathLike[str], model: SyntheticModel) -> None:
    """Write the model's file; the same `model` gives the same bytes.

    Raises:
        ValueError: fewer tokens than the byte vocabulary has, or an unknown quantization.
    """
    if model.n_vocab < len(_SPECIAL_TOKENS) + 256:
        raise ValueError(f"n_vocab is {model.n_vocab}; the byte vocabulary has 259 tokens")
    if model.quantization not in _MIXES and model.quantization not in _NUMBERS:
        raise ValueError(f"{model.quantization!r} is neither a ggml type nor one of {', '.join(_MIXES)}")
    tensors = list(_tensors(model))
    pairs = list(_metadata(model))
    rows = _RandomRows(model.seed)
    with open(path, "wb") as file:  # noqa: PTH123 - `path` may be any path-like object
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
        file.writelines(_encode_pair(key, value) for key, value in pairs)
        offset = 0
        for tensor in tensors:
            file.write(_encode_text(tensor.name))
            axes = len(tensor.shape)
            file.write(struct.pack(f"<I{axes}QIQ", axes, *tensor.shape, tensor.type, offset))
            offset += -(-tensor.size // _ALIGNMENT) * _ALIGNMENT
        for tensor in tensors:
            _pad(file)
            file.write(_values(tensor, model, rows).data)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


# --- metadata -----------------------------------------------------------------------------------


def _encode_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_pair(key: str, value: Any) -> bytes:
    head = _encode_text(key)
    if isinstance(value, bool):
        return head + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return head + struct.pack("<If", 6, value)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + _encode_text(value)
    if isinstance(value, np.ndarray):
        kind = {np.dtype(np.float32): 6, np.dtype(np.int32): 5}[value.dtype]
        return head + struct.pack("<IIQ", 9, kind, len(value)) + value.tobytes()
    return head + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_encode_text, value))


def _metadata(model: SyntheticModel) -> Iterator[tuple[str, Any]]:
    arch = model.architecture
    yield "general.architecture", arch
    yield "general.name", "synthetic"
    yield f"{arch}.context_length", model.n_ctx
    yield f"{arch}.embedding_length", model.n_embd
    yield f"{arch}.block_count", model.n_layers
    yield f"{arch}.feed_forward_length", model.n_ff
    yield f"{arch}.attention.head_count", model.n_head
    yield f"{arch}.attention.head_count_kv", model.n_head_kv
    yield f"{arch}.attention.layer_norm_rms_epsilon", model.norm_epsilon
    yield f"{arch}.rope.dimension_count", model.head_width
    yield f"{arch}.rope.freq_base", model.rope_base
    yield f"{arch}.vocab_size", model.n_vocab
    if model.head_dim is not None:
        yield f"{arch}.attention.key_length", model.head_dim
        yield f"{arch}.attention.value_length", model.head_dim
    if model.rope_scaling is not None:
        prefix, scaling = f"{arch}.rope.scaling", model.rope_scaling
        yield f"{prefix}.type", scaling.type
        if scaling.factor is not None:
            yield f"{prefix}.factor", scaling.factor
        if scaling.original_context is not None:
            yield f"{prefix}.original_context_length", scaling.original_context
        if scaling.attn_factor is not None:
            yield f"{prefix}.attn_factor", scaling.attn_factor
    yield from _vocabulary(model)
    if model.chat_template is not None:
        yield "tokenizer.chat_template", model.chat_template


def _vocabulary(model: SyntheticModel) -> Iterator[tuple[str, Any]]:
    """Three special tokens, 256 bytes, then all words over a small alphabet, the short ones first."""
    n_vocab, n_bytes_end = model.n_vocab, len(_SPECIAL_TOKENS) + 256
    letters, first_length, byte_kind = _LETTERS, 1, _BYTE
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    if model.pre_tokenizer is not None:
        bytes_, first_length, byte_kind = _byte_alphabet(), 2, _NORMAL
        letters = _LETTERS.replace("▁", bytes_[ord(" ")])
    words = ("".join(w) for n in itertools.count(first_length) for w in itertools.product(letters, repeat=n))
    tokens = [*_SPECIAL_TOKENS, *bytes_, *itertools.islice(words, n_vocab - n_bytes_end)]
    types = np.full(n_vocab, _NORMAL, np.int32)
    types[:n_bytes_end] = [_UNKNOWN, _CONTROL, _CONTROL] + [byte_kind] * 256
    yield "tokenizer.ggml.tokens", tokens
    yield "tokenizer.ggml.token_type", types
    if model.pre_tokenizer is None:
        scores = np.zeros(n_vocab, np.float32)
        scores[n_bytes_end:] = -np.arange(n_vocab - n_bytes_end)
        yield "tokenizer.ggml.model", "llama"
        yield "tokenizer.ggml.scores", scores
    else:
        yield "tokenizer.ggml.model", "gpt2"
        yield "tokenizer.ggml.pre", model.pre_tokenizer
        yield "tokenizer.ggml.merges", [f"{word[:-1]} {word[-1]}" for word in tokens[n_bytes_end:]]
    yield "tokenizer.ggml.bos_token_id", 1
    yield "tokenizer.ggml.eos_token_id", 2
    yield "tokenizer.ggml.unknown_token_id", 0
    yield "tokenizer.ggml.add_bos_token", True


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: the byte's own, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# --- tensors ------------------------------------------------------------------------------------


def _tensors(model: SyntheticModel) -> Iterator[_Tensor]:
    n_embd, n_ff = model.n_embd, model.n_ff
    queries, keys = model.n_head * model.head_width, model.n_head_kv * model.head_width

    def matrix(name: str, n_in: int, n_out: int, layer: int | None = None) -> _Tensor:
        return _Tensor(f"{name}.weight", (n_in, n_out), _matrix_type(model, name, n_in, layer))

    def vector(name: str, length: int) -> _Tensor:
        return _Tensor(name, (length,), ggml.TYPE_F32)

    yield matrix("token_embd", n_embd, model.n_vocab)
    yield vector("output_norm.weight", n_embd)
    if not model.tied_head:
        yield matrix("output", n_embd, model.n_vocab)
    if model.rope_factors:
        yield vector("rope_freqs.weight", model.head_width // 2)
    for layer in range(model.n_layers):
        block = f"blk.{layer}"
        widths = {
            "attn_q": (n_embd, queries),
            "attn_k": (n_embd, keys),
            "attn_v": (n_embd, keys),
            "attn_output": (queries, n_embd),
            "ffn_gate": (n_embd, n_ff),
            "ffn_up": (n_embd, n_ff),
            "ffn_down": (n_ff, n_embd),
        }
        yield vector(f"{block}.attn_norm.weight", n_embd)
        yield vector(f"{block}.ffn_norm.weight", n_embd)
        if model.architecture == "qwen3":
            yield vector(f"{block}.attn_q_norm.weight", model.head_width)
            yield vector(f"{block}.attn_k_norm.weight", model.head_width)
        for kind, (n_in, n_out) in widths.items():
            yield matrix(f"{block}.{kind}", n_in, n_out, layer)
            if model.all_biases or (model.biases and kind in ("attn_q", "attn_k", "attn_v")):
                yield vector(f"{block}.{kind}.bias", n_out)
    for name, shape in model.extra_tensors:
        yield _Tensor(name, shape, ggml.TYPE_F32)


def _matrix_type(model: SyntheticModel, name: str, row_length: int, layer: int | None) -> int:
    """The type that llama.cpp's quantizer gives a matrix."""
    base, better = _MIXES.get(model.quantization, (model.quantization,) * 2)
    chosen = base
    is_head = name == "output" or (name == "token_embd" and model.tied_head)
    if is_head and not model.pure and base not in (*_FLOATING, "Q8_0"):
        chosen = "Q8_0" if row_length % GGML_TYPES[_NUMBERS[base]].block_size else "Q6_K"
    elif layer is not None and name.endswith(("attn_v", "ffn_down")):
        eighth = model.n_layers // 8
        if layer < eighth or layer >= 7 * model.n_layers // 8 or (layer - eighth) % 3 == 2:
            chosen = better
    if row_length % GGML_TYPES[_NUMBERS[chosen]].block_size:
        chosen = _FALLBACK.get(chosen, "IQ4_NL" if chosen.startswith("IQ") else chosen)
    if row_length % GGML_TYPES[_NUMBERS[chosen]].block_size:
        chosen = "F16"
    return _NUMBERS[chosen]


def _values(tensor: _Tensor, model: SyntheticModel, rows: _RandomRows) -> NDArray[Any]:
    if len(tensor.shape) == 2 and not any(tensor.name == name for name, _ in model.extra_tensors):
        row_length, n_rows = tensor.shape
        scale = 1 / np.sqrt(row_length)
        if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and model.tied_head):
            scale *= _HEAD_GAIN
        elif tensor.name == "token_embd.weight":
            scale = 1.0
        return rows.matrix(tensor.type, row_length, n_rows, float(scale))
    normal = rows.generator.standard_normal(int(np.prod(tensor.shape)), np.float32)
    if tensor.name == "rope_freqs.weight":
        return np.geomspace(1, 8, tensor.shape[0]).astype(np.float32)
    return np.float32(0.2) * normal + np.float32(tensor.name.endswith("norm.weight"))


class _RandomRows:
    """Random matrices in ggml's types."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self._pools: dict[tuple[int, int, float], NDArray[np.uint8]] = {}

    def matrix(self, type_: int, row_length: int, n_rows: int, scale: float) -> NDArray[np.uint8]:
        """Normally distributed rows, (n_rows, bytes of a row)."""
        searched = GGML_TYPES[type_].name.startswith(("IQ1", "IQ2", "IQ3"))
        pool_elements = _SLOW_POOL_ELEMENTS if searched else _POOL_ELEMENTS
        if n_rows * row_length <= pool_elements // 4:
            return self._quantized(type_, row_length, n_rows, scale)
        key = (type_, row_length, scale)
        if key not in self._pools:
            self._pools[key] = self._quantized(type_, row_length, pool_elements // row_length + 1, scale)
        pool = self._pools[key]
        return pool[self.generator.integers(0, len(pool), n_rows)]

    def _quantized(self, type_: int, row_length: int, n_rows: int, scale: float) -> NDArray[np.uint8]:
        values = self.generator.standard_normal((n_rows, row_length), np.float32)
        values *= np.float32(scale)
        result = np.empty((n_rows, int(ggml.row_size(type_, row_length))), np.uint8)
        # Types below 3 bits need to be told how much each column matters: here, all the same.
        importance = np.ones(row_length, np.float32) if ggml.quantize_requires_imatrix(type_) else None
        weights = None if importance is None else importance.ctypes.data
        ggml.quantize_chunk(type_, values.ctypes.data, result.ctypes.data, 0, n_rows, row_length, weights)
        return result
