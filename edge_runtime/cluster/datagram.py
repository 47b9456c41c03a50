"""The datagrams of the data plane, inside their seal.

A request carries a layer's inputs, an answer a contribution, both cut into fragments that fit a datagram::

    step u32, layer u16, plan u16, total u32, fragment u16, n_fragments u16, compute microseconds u32,
    n_rows u16, form and copies u8, length of the mask u8, mask, slice

`total` counts bytes of a request and values of an answer. All fragments but the last are equally long, so
that (total, n_fragments) says what each holds; those of answers are cut at multiples of 32 values and are of
use alone. The mask is of requests that ask again: which fragments of the answer are missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from math import isfinite
from struct import Struct
from typing import NamedTuple

import numpy as np

from edge_runtime.cluster.exchange import ANSWER_FORMS, MAX_COPIES, MAX_LAYER, MAX_ROWS, PLAN_MASK, Floats
from edge_runtime.cluster.sealing import HEADER_BYTES, TAG_BYTES
from edge_runtime.engine.activations import ActivationForm, encode
from edge_runtime.errors import RequestError

DATAGRAM_BYTES = 1400  # fits where tunnels take their part of 1,500
LEAST_DATAGRAM_BYTES = 256
MOST_DATAGRAM_BYTES = 65_507
MAX_FRAGMENTS = 1024
MAX_INPUT_BYTES = 1 << 20
MAX_ANSWER_VALUES = 1 << 20

BODY = Struct("<IHHIHHIHBB")
REFUSED = Struct("<IHHB")  # step, layer, plan, reason
PING_BYTES = 8
INPUT_UNIT = 16  # bytes at whose multiples inputs are cut
VALUE_UNIT = 32  # values at whose multiples answers are cut; a block of Q8_0
MOST_MASK_BYTES = 32
ALL_MISSING = 255  # length of a mask that is not there and stands for every fragment
NOT_REPEATED = 0

_BLOCK_BYTES = {ActivationForm.F32: 128, ActivationForm.F16: 64, ActivationForm.Q8_0: 34}
_FORMS = {int(form): form for form in ANSWER_FORMS}
_F32, _F16, _Q8_0 = int(ActivationForm.F32), int(ActivationForm.F16), int(ActivationForm.Q8_0)
_FLOAT32, _FLOAT16 = np.dtype("<f4"), np.dtype("<f2")
_BLOCK = np.dtype([("scale", "<f2", 1), ("quants", "i1", VALUE_UNIT)])
_NOTHING: Floats = np.empty(0, np.float32)
_MOST_MICROSECONDS = (1 << 32) - 1


class Kind(IntEnum):
    """What a datagram is; stands in its clear header."""

    REQUEST = 1
    ANSWER = 2
    PING = 3
    PONG = 4
    REFUSED = 5
    NO_SESSION = 6  # a clear header and nothing else: whoever sent it holds no key


class BadDatagramError(Exception):
    """Content that breaks the format. Dropped and counted, never shown to anyone."""


class Cut(NamedTuple):
    """`n_fragments` fragments of `size` bytes or values, the last one perhaps shorter."""

    n_fragments: int
    size: int


def cut(total: int, unit: int, most: int) -> Cut:
    """Cut `total` at multiples of `unit` into as few equal fragments of at most `most` as do."""
    units = -(-total // unit)
    n_fragments = max(1, -(-units // (most // unit)))
    size = max(1, -(-units // n_fragments))
    return Cut(max(1, -(-units // size)), size * unit)


def fragment_size(total: int, n_fragments: int, unit: int) -> int:
    """Size of all fragments but the last.

    Raises:
        BadDatagramError: nobody cuts like that.
    """
    units = -(-total // unit)
    size = -(-units // n_fragments)
    if size < 1 or -(-units // size) != n_fragments:
        raise BadDatagramError
    return size * unit


def input_room(datagram_bytes: int) -> int:
    """Bytes of inputs that a datagram takes, with a mask beside them."""
    room = datagram_bytes - HEADER_BYTES - BODY.size - TAG_BYTES - MOST_MASK_BYTES
    return room // INPUT_UNIT * INPUT_UNIT


def value_room(datagram_bytes: int, form: ActivationForm) -> int:
    """Values of an answer that a datagram takes."""
    return (datagram_bytes - HEADER_BYTES - BODY.size - TAG_BYTES) // _BLOCK_BYTES[form] * VALUE_UNIT


def mask_of(missing: int) -> tuple[int, bytes]:
    """How a request asks again for the fragments whose bits are set: length and content of the mask.

    Zero or less, and what is too long for a mask, stands for every fragment.
    """
    length = (missing.bit_length() + 7) // 8
    if missing <= 0 or length > MOST_MASK_BYTES:
        return ALL_MISSING, b""
    return length, missing.to_bytes(length, "little")


def request_bodies(
    step: int,
    layer: int,
    plan: int,
    n_rows: int,
    form: ActivationForm,
    copies: int,
    inputs: bytes,
    room: int,
    mask: tuple[int, bytes] = (NOT_REPEATED, b""),
) -> list[bytes]:
    """A request's contents, one for each datagram.

    Args:
        form: in which the sums come back.
        copies: of each of the answer's datagrams.
        room: `input_room` of the datagrams.
        mask: `mask_of` what is missing, where the request asks again.

    Raises:
        RequestError: a number out of range, or more than datagrams carry.
    """
    total = len(inputs)
    n_fragments, size = cut(total, INPUT_UNIT, room)
    if not (0 <= step < 1 << 32 and 0 <= layer <= MAX_LAYER and 0 < n_rows <= MAX_ROWS):
        raise RequestError(
            f"step {step}, layer {layer}, {n_rows} rows; datagrams carry steps below 2^32, "
            f"layers up to {MAX_LAYER} and 1 to {MAX_ROWS} rows"
        )
    if not 0 < total <= MAX_INPUT_BYTES or n_fragments > MAX_FRAGMENTS or not 0 < copies <= MAX_COPIES:
        raise RequestError(
            f"inputs of {total} bytes in {n_fragments} datagrams, {copies} times; possible are 1 to "
            f"{MAX_INPUT_BYTES} bytes in {MAX_FRAGMENTS}, 1 to {MAX_COPIES} times; send fewer rows at once"
        )
    mask_bytes, mask_content = mask
    low, how = plan & PLAN_MASK, form | copies << 4
    return [
        BODY.pack(step, layer, low, total, fragment, n_fragments, 0, n_rows, how, mask_bytes)
        + mask_content
        + inputs[fragment * size : (fragment + 1) * size]
        for fragment in range(n_fragments)
    ]


# step, layer, plan, total, fragment, n_fragments, n_rows, form, copies, missing (0: not asked again,
# -1: everything), slice
RequestFields = tuple[int, int, int, int, int, int, int, ActivationForm, int, int, memoryview]


def read_request(body: bytes) -> RequestFields:
    """What a request's datagram says, checked.

    Raises:
        BadDatagramError: it breaks the format.
    """
    if len(body) < BODY.size:
        raise BadDatagramError
    step, layer, plan, total, fragment, n_fragments, _, n_rows, how, mask_bytes = BODY.unpack_from(body)
    form = _FORMS.get(how & 15)
    copies = how >> 4
    if (
        form is None
        or not 0 < copies <= MAX_COPIES
        or layer > MAX_LAYER
        or not 0 < n_rows <= MAX_ROWS
        or not 0 < total <= MAX_INPUT_BYTES
        or not fragment < n_fragments <= MAX_FRAGMENTS
    ):
        raise BadDatagramError
    start, missing = BODY.size, 0
    if mask_bytes == ALL_MISSING:
        missing = -1
    elif mask_bytes:
        start += mask_bytes
        missing = int.from_bytes(body[BODY.size : start], "little")
        if mask_bytes > MOST_MASK_BYTES or not missing:
            raise BadDatagramError
    size = fragment_size(total, n_fragments, INPUT_UNIT)
    if len(body) - start != min(size, total - fragment * size):
        raise BadDatagramError
    part = memoryview(body)[start:]
    return step, layer, plan, total, fragment, n_fragments, n_rows, form, copies, missing, part


def answer_bodies(
    step: int,
    layer: int,
    plan: int,
    form: ActivationForm,
    sums: Floats,
    compute_microseconds: int,
    datagram_bytes: int,
) -> list[bytes]:
    """An answer's contents, one for each datagram; `sums` is (n_rows, n_out) float32.

    Raises:
        RequestError: more than datagrams carry.
    """
    total, n_rows = sums.size, len(sums)
    n_fragments, size = cut(total, VALUE_UNIT, value_room(datagram_bytes, form))
    if not 0 < total <= MAX_ANSWER_VALUES or n_fragments > MAX_FRAGMENTS:
        raise RequestError(
            f"{total} values in {n_fragments} datagrams; possible are 1 to {MAX_ANSWER_VALUES} values in "
            f"{MAX_FRAGMENTS}; ask for fewer rows at once or use streams"
        )
    flat = np.ascontiguousarray(sums, "<f4").reshape(-1)
    if form is ActivationForm.Q8_0 and total % VALUE_UNIT:
        flat = np.concatenate([flat, np.zeros(-total % VALUE_UNIT, np.float32)])
    content = memoryview(encode(form, flat.reshape(1, -1)))
    stride = size // VALUE_UNIT * _BLOCK_BYTES[form]
    microseconds = min(compute_microseconds, _MOST_MICROSECONDS)
    low = plan & PLAN_MASK
    return [
        BODY.pack(step, layer, low, total, fragment, n_fragments, microseconds, n_rows, form | 16, 0)
        + content[fragment * stride : (fragment + 1) * stride]
        for fragment in range(n_fragments)
    ]


# step, layer, plan, total, fragment, n_fragments, compute microseconds, n_rows, form
AnswerFields = tuple[int, int, int, int, int, int, int, int, int]


def read_answer(body: bytes) -> AnswerFields:
    """What an answer's datagram says; `answer_values` has its numbers.

    Raises:
        BadDatagramError: it breaks the format.
    """
    if len(body) < BODY.size:
        raise BadDatagramError
    step, layer, plan, total, fragment, n_fragments, took, n_rows, how, mask_bytes = BODY.unpack_from(body)
    if (
        mask_bytes
        or layer > MAX_LAYER
        or not 0 < n_rows <= MAX_ROWS
        or not 0 < total <= MAX_ANSWER_VALUES
        or not fragment < n_fragments <= MAX_FRAGMENTS
    ):
        raise BadDatagramError
    return step, layer, plan, total, fragment, n_fragments, took, n_rows, how & 15


def answer_values(body: bytes, total: int, fragment: int, size: int, form: int) -> tuple[int, Floats]:
    """The slice of an answer: index of its first value and its values, finite.

    Args:
        size: `fragment_size` of the answer.

    Raises:
        BadDatagramError: another length than its place asks for, or numbers that are none.
    """
    first = fragment * size
    count = min(size, total - first)
    if form == _F32:
        values: Floats = np.frombuffer(body, _FLOAT32, -1, BODY.size) if not len(body) % 4 else _NOTHING
    elif form == _Q8_0:
        values = _blocks_of(body)[:count]
        if len(body) - BODY.size != -(-count // VALUE_UNIT) * _BLOCK_BYTES[ActivationForm.Q8_0]:
            raise BadDatagramError
    elif form == _F16 and not len(body) % 2:
        values = np.frombuffer(body, _FLOAT16, -1, BODY.size).astype(np.float32)
    else:
        raise BadDatagramError
    if len(values) != count or not is_sound(values):
        raise BadDatagramError
    return first, values


def _blocks_of(body: bytes) -> Floats:
    """Values of whole blocks of Q8_0; `decode`, through ctypes, takes half as long again for so few."""
    if (len(body) - BODY.size) % _BLOCK.itemsize:
        raise BadDatagramError
    blocks = np.frombuffer(body, _BLOCK, -1, BODY.size)
    values: Floats = blocks["quants"] * blocks["scale"].astype(np.float32)
    return values.reshape(-1)


def is_sound(values: Floats) -> bool:
    """Whether all values are finite, and none so large that its square is not.

    Half of what `np.isfinite` takes; `vdot`, unlike `dot`, has no warning for what a peer sends.
    """
    return isfinite(np.vdot(values, values))


def chosen(bodies: list[bytes], missing: int) -> Iterable[bytes]:
    """Those of an answer's contents whose bits are set in `missing`; all where it is less than 0."""
    if missing < 0:
        return bodies
    return [body for fragment, body in enumerate(bodies) if missing >> fragment & 1]
