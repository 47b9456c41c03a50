"""Model files taken apart, damaged in ways that keep most of them whole, and put together again."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from edge_runtime.engine.gguf import GGUFFile

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 16, 31, 32, 33, 48, 63, 64, 65, 127, 128, 255, 256, 1000, 1024, 1025]),
    st.sampled_from([2**15, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**64 - 1]),
    st.integers(0, 300),
    st.integers(0, 2**64 - 1),
)
REALS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 1e-6, 1e30, float("inf"), float("-inf"), float("nan")]),
    st.floats(-1e30, 1e30),
)
ARCHITECTURES = [b"llama", b"qwen2", b"qwen3", b"bert"]
VOCABULARIES = [b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"no_vocab", b"test"]
RULES = [b"default", b"gpt-2", b"tekken", b"superbpe", b"whitespace", b"gemma4", b"kimi-k2", b"deepseek-llm"]
TEXTS = st.one_of(
    st.sampled_from([*ARCHITECTURES, *VOCABULARIES, *RULES, b"yarn", b"linear", b"none", b"longrope"]),
    st.sampled_from([b"", b"\0", b"adapter", b"\xff\xfe", b"a" * 70, b"phi-3"]),
    st.binary(max_size=12),
)
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(repr=False)
class Tensor:
    name: bytes
    shape: list[int]
    type: int
    content: bytes
    offset: int | None = None  # None: where the content lies


@dataclass(repr=False)
class Parts:
    """A GGUF in pieces. `pairs` holds (key, type and value as encoded)."""

    pairs: list[tuple[bytes, bytes]]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    counts: list[int | None] = field(default_factory=lambda: [None, None])
    alignment: int = 32

    def encode(self) -> bytes:
        counts = [len(self.tensors), len(self.pairs)]
        counts = [real if wrong is None else wrong for real, wrong in zip(counts, self.counts, strict=True)]
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        head += b"".join(string(key) + value for key, value in self.pairs)
        offset, data = 0, b""
        for tensor in self.tensors:
            place = offset if tensor.offset is None else tensor.offset
            axes = len(tensor.shape)
            head += string(tensor.name) + struct.pack(f"<I{axes}QIQ", axes, *tensor.shape, tensor.type, place)
            padded = tensor.content + bytes(-len(tensor.content) % self.alignment)
            data += padded
            offset += len(padded)
        return head + bytes(-len(head) % self.alignment) + data


class Case(bytes):
    """A file's content, not worth printing."""

    def __repr__(self) -> str:
        return f"<file of {len(self)} bytes>"


def string(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def scalar(type_: int, value: Any) -> bytes:
    """A value of `type_`, cut to its width."""
    layout = SCALARS[type_]
    if type_ in (6, 12):
        return struct.pack("<I", type_) + struct.pack(layout, value)
    raw = (int(value) & (2**64 - 1)).to_bytes(8, "little")
    return struct.pack("<I", type_) + raw[: struct.calcsize(layout)]


def strings(texts: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(map(string, texts))


def take_apart(path: Path) -> Parts:
    """The parts of a sound file."""
    with GGUFFile(path) as gguf:
        pairs = []
        for key in gguf.metadata:
            raw = gguf.key_value_bytes(key)
            pairs.append((key.encode(), raw[8 + len(key.encode()) :]))
        tensors = [
            Tensor(
                record.name.encode(), list(record.shape), record.type, bytes(gguf.tensor_bytes(record.name))
            )
            for record in gguf.tensors.values()
        ]
    return Parts(pairs, tensors)


Draw = Callable[[st.SearchStrategy[Any]], Any]


def _pick(draw: Draw, items: list[Any]) -> int:
    return int(draw(st.integers(0, len(items) - 1)))


def _find(parts: Parts, key: bytes) -> int | None:
    return next((index for index, pair in enumerate(parts.pairs) if pair[0] == key), None)


def wrong_scalar(draw: Draw, parts: Parts) -> None:
    index = _pick(draw, parts.pairs)
    key, value = parts.pairs[index]
    kind = struct.unpack_from("<I", value)[0]
    if kind not in SCALARS or draw(st.booleans()):
        kind = draw(st.sampled_from(sorted(SCALARS)))
    new = scalar(kind, draw(REALS if kind in (6, 12) else NUMBERS))
    parts.pairs[index] = (key, new)


def wrong_string(draw: Draw, parts: Parts) -> None:
    texts = [i for i, (_, value) in enumerate(parts.pairs) if value[:4] == b"\x08\0\0\0"]
    index = texts[_pick(draw, texts)] if texts and draw(st.booleans()) else _pick(draw, parts.pairs)
    parts.pairs[index] = (parts.pairs[index][0], struct.pack("<I", 8) + string(draw(TEXTS)))


def missing_key(draw: Draw, parts: Parts) -> None:
    del parts.pairs[_pick(draw, parts.pairs)]


def further_key(draw: Draw, parts: Parts) -> None:
    arch = draw(st.sampled_from([b"llama", b"qwen2", b"qwen3"]))
    names = [b"expert_count", b"attention.sliding_window", b"rope.scaling.factor", b"rope.scaling.type"]
    names += [b"attention.key_length", b"attention.value_length", b"rope.freq_base", b"logit_scale"]
    names += [b"rope.scaling.original_context_length", b"attention.scale", b"attention.causal"]
    key = arch + b"." + draw(st.sampled_from(names))
    if draw(st.booleans()):
        name = draw(st.sampled_from([b"alignment", b"name", b"type", b"file_type"]))
        key = b"general." + name
    kind = draw(st.sampled_from([4, 5, 6, 7, 8, 10]))
    value = (
        struct.pack("<I", 8) + string(draw(TEXTS))
        if kind == 8
        else scalar(kind, draw(REALS if kind == 6 else NUMBERS))
    )
    parts.pairs.insert(draw(st.integers(0, len(parts.pairs))), (key, value))


def same_key_twice(draw: Draw, parts: Parts) -> None:
    parts.pairs.append(parts.pairs[_pick(draw, parts.pairs)])


def wrong_key(draw: Draw, parts: Parts) -> None:
    index = _pick(draw, parts.pairs)
    parts.pairs[index] = (draw(TEXTS), parts.pairs[index][1])


def wrong_array(draw: Draw, parts: Parts) -> None:
    index = _pick(draw, parts.pairs)
    key, value = parts.pairs[index]
    element, count = draw(st.integers(0, 13)), draw(NUMBERS)
    rest = value[16:] if draw(st.booleans()) else draw(st.binary(max_size=64))
    parts.pairs[index] = (key, struct.pack("<IIQ", 9, element, count) + rest)


def array_for_a_number(draw: Draw, parts: Parts) -> None:
    index = _pick(draw, parts.pairs)
    numbers = draw(st.lists(st.integers(0, 2**32 - 1), max_size=6))
    parts.pairs[index] = (
        parts.pairs[index][0],
        struct.pack(f"<IIQ{len(numbers)}I", 9, 4, len(numbers), *numbers),
    )


def wrong_counts(draw: Draw, parts: Parts) -> None:
    parts.counts[draw(st.integers(0, 1))] = draw(NUMBERS)


def wrong_version(draw: Draw, parts: Parts) -> None:
    if draw(st.booleans()):
        parts.version = draw(st.sampled_from([0, 1, 2, 4, 0x03000000, 2**32 - 1]))
    else:
        parts.magic = draw(st.sampled_from([b"GGUE", b"ggml", b"FUGG", b"\0\0\0\0"]))


def wrong_shape(draw: Draw, parts: Parts) -> None:
    tensor = parts.tensors[_pick(draw, parts.tensors)]
    kind = draw(st.integers(0, 3))
    if kind == 0 and tensor.shape:
        tensor.shape[_pick(draw, tensor.shape)] = draw(NUMBERS)
    elif kind == 1:
        tensor.shape = draw(st.lists(NUMBERS, max_size=6))
    elif kind == 2:
        tensor.shape.reverse()
    else:
        tensor.shape.append(draw(st.integers(0, 2)))


def wrong_tensor_type(draw: Draw, parts: Parts) -> None:
    tensor = parts.tensors[_pick(draw, parts.tensors)]
    tensor.type = draw(st.one_of(st.integers(0, 45), st.just(2**32 - 1)))
    if draw(st.booleans()):
        tensor.content = tensor.content + bytes(len(tensor.content) * 3)


def wrong_offset(draw: Draw, parts: Parts) -> None:
    parts.tensors[_pick(draw, parts.tensors)].offset = draw(st.one_of(NUMBERS, st.just(0), st.just(32)))


def wrong_name(draw: Draw, parts: Parts) -> None:
    index = _pick(draw, parts.tensors)
    other = parts.tensors[_pick(draw, parts.tensors)].name
    new = [
        other,
        b"blk.0.attn_qkv.weight",
        b"blk.0.ffn_gate_inp.weight",
        b"output.bias",
        b"rope_freqs.weight",
    ]
    parts.tensors[index].name = draw(st.one_of(st.sampled_from(new), TEXTS))


def missing_tensor(draw: Draw, parts: Parts) -> None:
    del parts.tensors[_pick(draw, parts.tensors)]


def random_content(draw: Draw, parts: Parts) -> None:
    tensor = parts.tensors[_pick(draw, parts.tensors)]
    noise = draw(st.binary(min_size=1, max_size=64))
    tensor.content = (noise * (len(tensor.content) // len(noise) + 1))[: len(tensor.content)]


def wrong_token(draw: Draw, parts: Parts) -> None:
    index = _find(parts, b"tokenizer.ggml.tokens")
    if index is None or parts.pairs[index][1][4:8] != b"\x08\0\0\0":
        return
    texts = _read_strings(parts.pairs[index][1])
    if not texts:
        return
    for _ in range(draw(st.integers(1, 4))):
        place = _pick(draw, texts)
        new = [
            texts[_pick(draw, texts)],
            b"",
            b"[EMPTY_5]",
            b"</s>",
            b"<0x41>",
            b"<0x",
            b"\xe3\x81",
            b"x" * 2000,
        ]
        new += ["日本語".encode() * 100, b"<|im_end|>", b"<PRE>", b"\xe2\x96\x81", b"<0xZZ>", b" ", b"\n"]
        texts[place] = draw(st.one_of(st.sampled_from(new), st.binary(max_size=8)))
    if draw(st.integers(0, 5)) == 0:
        texts = texts[: draw(st.integers(0, len(texts)))]
    parts.pairs[index] = (b"tokenizer.ggml.tokens", strings(texts))


def wrong_merge(draw: Draw, parts: Parts) -> None:
    index = _find(parts, b"tokenizer.ggml.merges")
    if index is None or parts.pairs[index][1][4:8] != b"\x08\0\0\0":
        return
    texts = _read_strings(parts.pairs[index][1])
    new = [b"", b" ", b"a", b"a ", b" a", b"a b c", b"  ", b"\xff \xff", b"a a", b"aa aa", b"h e"]
    for _ in range(draw(st.integers(1, 4))):
        texts.insert(
            draw(st.integers(0, len(texts))), draw(st.one_of(st.sampled_from(new), st.binary(max_size=6)))
        )
    parts.pairs[index] = (b"tokenizer.ggml.merges", strings(texts))


def wrong_vocabulary_numbers(draw: Draw, parts: Parts) -> None:
    key = draw(st.sampled_from([b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type"]))
    index = _find(parts, key)
    if index is None or len(parts.pairs[index][1]) < 20:
        return
    raw = bytearray(parts.pairs[index][1])
    for _ in range(draw(st.integers(1, 4))):
        place = 16 + 4 * draw(st.integers(0, (len(raw) - 20) // 4))
        noise = draw(
            st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\x06\0\0\0", b"\x04\0\0\0", b"\xff" * 4])
        )
        raw[place : place + 4] = noise
    parts.pairs[index] = (key, bytes(raw))


def wrong_special_token(draw: Draw, parts: Parts) -> None:
    names = [b"bos_token_id", b"eos_token_id", b"unknown_token_id", b"padding_token_id", b"eot_token_id"]
    key = b"tokenizer.ggml." + draw(st.sampled_from([*names, b"add_bos_token", b"add_space_prefix"]))
    index = _find(parts, key)
    if index is not None and draw(st.booleans()):
        del parts.pairs[index]
        return
    kind = 7 if b"add_" in key else 4
    pair = (key, scalar(kind, draw(NUMBERS)))
    if index is None:
        parts.pairs.append(pair)
    else:
        parts.pairs[index] = pair


def _read_strings(value: bytes) -> list[bytes]:
    count, position, found = struct.unpack_from("<Q", value, 8)[0], 16, []
    for _ in range(count):
        if position + 8 > len(value):
            break
        length = struct.unpack_from("<Q", value, position)[0]
        found.append(value[position + 8 : position + 8 + length])
        position += 8 + length
    return found


DAMAGES = (
    wrong_scalar,
    wrong_scalar,
    wrong_string,
    missing_key,
    further_key,
    same_key_twice,
    wrong_key,
    wrong_array,
    array_for_a_number,
    wrong_counts,
    wrong_version,
    wrong_shape,
    wrong_tensor_type,
    wrong_offset,
    wrong_name,
    missing_tensor,
    random_content,
    wrong_token,
    wrong_token,
    wrong_merge,
    wrong_vocabulary_numbers,
    wrong_special_token,
)


def damaged_file(draw: Draw, bases: list[Parts]) -> Case:
    """One of `bases` with one to three kinds of damage, at times also cut off or with bytes changed."""
    parts = copy.deepcopy(bases[_pick(draw, bases)])
    for damage in draw(st.lists(st.sampled_from(DAMAGES), min_size=0, max_size=3)):
        if parts.pairs and parts.tensors:
            damage(draw, parts)
    raw = bytearray(parts.encode())
    kind = draw(st.integers(0, 5))
    if kind == 0:
        del raw[draw(st.one_of(st.integers(0, 64), st.integers(0, len(raw)))) :]
    elif kind == 1:
        reach = draw(st.sampled_from([32, 1024, len(raw)]))
        for _ in range(draw(st.integers(1, 8))):
            raw[draw(st.integers(0, min(reach, len(raw)) - 1))] = draw(st.integers(0, 255))
    return Case(raw)
