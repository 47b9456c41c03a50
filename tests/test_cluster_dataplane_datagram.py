"""The format of the data plane's datagrams, for honest peers and for others."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.cluster import datagram as wire
from edge_runtime.cluster.exchange import ANSWER_FORMS, MAX_LAYER, MAX_ROWS
from edge_runtime.cluster.sealing import HEADER_BYTES, TAG_BYTES
from edge_runtime.cluster.worker_session import Request
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

steps = st.integers(0, 2**32 - 1)
layers = st.integers(0, MAX_LAYER)
plans = st.integers(0, 2**64 - 1)
forms = st.sampled_from(ANSWER_FORMS)
sizes = st.integers(wire.LEAST_DATAGRAM_BYTES, 2000)
OVERHEAD = HEADER_BYTES + TAG_BYTES


def values_of(shape: tuple[int, int], seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put_together(bodies: list[bytes]) -> Floats:
    _, _, _, total, _, _, _, _, _ = wire.read_answer(bodies[0])
    found = np.full(total, np.nan, np.float32)
    for body in bodies:
        fields = wire.read_answer(body)
        size = wire.fragment_size(fields[3], fields[5], wire.VALUE_UNIT)
        first, values = wire.answer_values(body, fields[3], fields[4], size, fields[8])
        assert np.isnan(found[first : first + len(values)]).all()
        found[first : first + len(values)] = values
    return found


@given(steps, layers, plans, st.integers(1, MAX_ROWS), forms, st.integers(1, 4), st.data())
def test_a_request_arrives_whatever_the_order_of_its_fragments(
    step: int, layer: int, plan: int, n_rows: int, form: ActivationForm, copies: int, data: st.DataObject
) -> None:
    size = data.draw(sizes)
    inputs = random.Random(layer).randbytes(data.draw(st.integers(1, 20_000)))
    bodies = wire.request_bodies(step, layer, plan, n_rows, form, copies, inputs, wire.input_room(size))
    assert all(len(body) + OVERHEAD <= size for body in bodies)
    read = [wire.read_request(body) for body in data.draw(st.permutations(bodies))]
    request = Request(read[0])
    finished = [request.add(fields) for fields in read]
    assert finished == [False] * (len(bodies) - 1) + [True]
    assert bytes(request.content) == inputs
    assert (request.step, request.layer, request.plan) == (step, layer, plan & 0xFFFF)
    assert (request.n_rows, request.form, request.copies) == (n_rows, form, copies)
    assert not any(request.add(fields) for fields in read)


@given(st.integers(1, 5), st.integers(1, 3000), forms, sizes)
def test_an_answer_arrives_in_fragments_of_use_alone(
    n_rows: int, width: int, form: ActivationForm, size: int
) -> None:
    sums = values_of((n_rows, width))
    bodies = wire.answer_bodies(9, 3, 70_000, form, sums, 1234, size)
    assert all(len(body) + OVERHEAD <= size for body in bodies)
    lengths = [len(body) for body in bodies]
    assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0]  # what UDP_SEGMENT needs
    step, layer, plan, total, _, n_fragments, took, rows, _ = wire.read_answer(bodies[-1])
    assert (step, layer, plan, took) == (9, 3, 70_000 & 0xFFFF, 1234)
    assert (total, rows, n_fragments) == (n_rows * width, n_rows, len(bodies))
    found = put_together(bodies)
    if form is ActivationForm.F32:
        assert (found == sums.reshape(-1)).all()
    else:  # 11 bits, or 127 steps up to the block's largest value
        step_size = 2**-10 if form is ActivationForm.F16 else 1 / 127
        assert np.abs(found - sums.reshape(-1)).max() <= np.abs(sums).max() * step_size


def test_a_long_run_of_fragments_is_cut_evenly() -> None:
    assert wire.cut(2048, 32, 336) == (7, 320)
    assert wire.cut(2048, 32, 352) == (6, 352)
    assert wire.cut(1, 32, 320) == (1, 32)


@given(st.integers(1, 1 << 20), st.sampled_from([16, 32]), st.integers(1, 100))
def test_both_ends_cut_alike(total: int, unit: int, units: int) -> None:
    n_fragments, size = wire.cut(total, unit, units * unit)
    assert size <= units * unit and size % unit == 0
    assert (n_fragments - 1) * size < total <= n_fragments * size
    if n_fragments > 1:
        assert wire.fragment_size(total, n_fragments, unit) == size


@given(st.integers(-3, 1 << 300))
def test_the_mask_says_what_is_missing(missing: int) -> None:
    inputs = bytes(3000)
    mask = wire.mask_of(missing)
    room = wire.input_room(wire.DATAGRAM_BYTES)
    bodies = wire.request_bodies(1, 1, 1, 1, ActivationForm.F32, 1, inputs, room, mask)
    plain = wire.request_bodies(1, 1, 1, 1, ActivationForm.F32, 1, inputs, room)
    expected = missing if 0 < missing < 1 << 8 * wire.MOST_MASK_BYTES else -1
    for body, first in zip(bodies, plain, strict=True):
        fields, once = wire.read_request(body), wire.read_request(first)
        assert fields[9] == expected
        assert once[9] == 0
        assert fields[10] == once[10]


def test_only_missing_fragments_are_chosen() -> None:
    bodies = [b"0", b"1", b"2"]
    assert list(wire.chosen(bodies, 0b101)) == [b"0", b"2"]
    assert list(wire.chosen(bodies, -1)) == bodies
    assert list(wire.chosen(bodies, 1 << 7)) == []


# Positions in the fields that BODY packs.
LAYER, TOTAL, FRAGMENT, N_FRAGMENTS, N_ROWS, HOW, MASK = 1, 3, 4, 5, 7, 8, 9


def changed(body: bytes, changes: dict[int, int]) -> bytes:
    values = list(wire.BODY.unpack_from(body))
    for position, value in changes.items():
        values[position] = value
    return wire.BODY.pack(*values) + body[wire.BODY.size :]


@pytest.mark.parametrize(
    "changes",
    [
        {LAYER: MAX_LAYER + 1},
        {TOTAL: 0},
        {TOTAL: 2_000_000, N_FRAGMENTS: 1024},
        {TOTAL: 4000},
        {TOTAL: 16},  # which nobody cuts in three
        {FRAGMENT: 3},
        {FRAGMENT: 2},  # the last is shorter
        {N_FRAGMENTS: 0},
        {N_FRAGMENTS: 1025},
        {N_ROWS: 0},
        {N_ROWS: MAX_ROWS + 1},
        {HOW: 0},  # no copies
        {HOW: 5 << 4},
        {HOW: ActivationForm.Q8_K | 1 << 4},
        {HOW: 15 | 1 << 4},
        {MASK: 1},
        {MASK: 40},
        {MASK: 254},
    ],
    ids=str,
)
def test_a_request_with_a_wrong_field_is_dropped(changes: dict[int, int]) -> None:
    body = wire.request_bodies(1, 2, 3, 1, ActivationForm.F32, 1, bytes(3000), 1312)[0]
    assert wire.read_request(changed(body, {}))
    with pytest.raises(wire.BadDatagramError):
        wire.read_request(changed(body, changes))


def test_inputs_that_would_take_too_much_memory_are_dropped() -> None:
    for total, allowed in ((wire.MAX_INPUT_BYTES, True), (wire.MAX_INPUT_BYTES + 16, False)):
        n_fragments, size = wire.cut(total, wire.INPUT_UNIT, 2000)
        body = wire.BODY.pack(1, 2, 3, total, 0, n_fragments, 0, 1, 16, 0) + bytes(size)
        if allowed:
            assert wire.read_request(body)
        else:
            with pytest.raises(wire.BadDatagramError):
                wire.read_request(body)


def test_a_mask_of_any_length_but_its_own_is_dropped() -> None:
    room = 1312
    for length in (1, wire.MOST_MASK_BYTES, wire.MOST_MASK_BYTES + 1):
        (body,) = wire.request_bodies(
            1, 2, 3, 1, ActivationForm.F32, 1, b"inputs", room, (length, b"\1" * length)
        )
        if length <= wire.MOST_MASK_BYTES:
            assert wire.read_request(body)[9] > 0
        else:
            with pytest.raises(wire.BadDatagramError):
                wire.read_request(body)
    (body,) = wire.request_bodies(1, 2, 3, 1, ActivationForm.F32, 1, b"inputs", room, (2, bytes(2)))
    with pytest.raises(wire.BadDatagramError):
        wire.read_request(body)  # it asks for nothing


@pytest.mark.parametrize(
    "changes",
    [
        {LAYER: MAX_LAYER + 1},
        {TOTAL: 0},
        {TOTAL: 1_100_000, N_FRAGMENTS: 1024},
        {FRAGMENT: 4},
        {N_FRAGMENTS: 0},
        {N_FRAGMENTS: 1025},
        {N_ROWS: 0},
        {N_ROWS: MAX_ROWS + 1},
        {MASK: 1},
    ],
    ids=str,
)
def test_an_answer_with_a_wrong_field_is_dropped(changes: dict[int, int]) -> None:
    body = wire.answer_bodies(1, 2, 3, ActivationForm.F32, values_of((1, 1000)), 4, 1400)[0]
    assert wire.read_answer(changed(body, {}))
    with pytest.raises(wire.BadDatagramError):
        wire.read_answer(changed(body, changes))


@pytest.mark.parametrize("form", ANSWER_FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("by", [-4, -2, -1, 1, 2, 4, 34, 128])
def test_an_answers_slice_of_another_length_is_dropped(form: ActivationForm, by: int) -> None:
    (body,) = wire.answer_bodies(1, 2, 3, form, values_of((1, 96)), 4, 1400)
    other = body[:by] if by < 0 else body + bytes(by)
    with pytest.raises(wire.BadDatagramError):
        wire.answer_values(other, 96, 0, 96, form)


@pytest.mark.parametrize(("total", "n_fragments"), [(64, 3), (320, 7), (1 << 20, 1023)])
def test_what_nobody_cuts_like_that_is_dropped(total: int, n_fragments: int) -> None:
    with pytest.raises(wire.BadDatagramError):
        wire.fragment_size(total, n_fragments, 32)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_dropped_as_such(content: bytes) -> None:
    read_anything(content)


@given(st.booleans(), st.data())
def test_a_datagram_with_other_fields_is_dropped_or_within_bounds(
    is_request: bool, data: st.DataObject
) -> None:
    if is_request:
        mask = wire.mask_of(data.draw(st.sampled_from([0, 5, 1 << 70])))
        body = wire.request_bodies(1, 2, 3, 1, ActivationForm.Q8_0, 1, bytes(3000), 1300, mask)[0]
    else:
        body = wire.answer_bodies(1, 2, 3, data.draw(forms), values_of((1, 1000)), 4, 1400)[0]
    other = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        other[data.draw(st.integers(0, wire.BODY.size - 1))] = data.draw(st.integers(0, 255))
    read_anything(bytes(other[: data.draw(st.integers(0, len(other)))]))
    read_anything(bytes(other))


def read_anything(content: bytes) -> None:
    try:
        fields = wire.read_request(content)
    except wire.BadDatagramError:
        pass
    else:
        assert len(fields[10]) <= len(content)
        assert 0 < fields[3] <= wire.MAX_INPUT_BYTES
        Request(fields).add(fields)
    try:
        answer = wire.read_answer(content)
        size = wire.fragment_size(answer[3], answer[5], wire.VALUE_UNIT)
        first, values = wire.answer_values(content, answer[3], answer[4], size, answer[8])
    except wire.BadDatagramError:
        return
    assert 0 <= first < first + len(values) <= answer[3] <= wire.MAX_ANSWER_VALUES
    assert np.isfinite(values).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("form", [ActivationForm.F32, ActivationForm.F16], ids=lambda form: form.name)
def test_numbers_that_are_none_are_dropped(value: float, form: ActivationForm) -> None:
    sums = values_of((1, 64))
    sums[0, 17] = value
    with np.errstate(over="ignore"):
        (body,) = wire.answer_bodies(1, 1, 1, form, sums, 0, 1400)
    with pytest.raises(wire.BadDatagramError):
        wire.answer_values(body, 64, 0, 64, form)


def test_a_block_scale_that_is_no_number_is_dropped() -> None:
    (body,) = wire.answer_bodies(1, 1, 1, ActivationForm.Q8_0, values_of((1, 64)), 0, 1400)
    scale = np.array([np.nan], "<f2").tobytes()
    broken = body[: wire.BODY.size] + scale + body[wire.BODY.size + 2 :]
    with pytest.raises(wire.BadDatagramError):
        wire.answer_values(broken, 64, 0, 64, ActivationForm.Q8_0)


@pytest.mark.parametrize(
    "numbers",
    [
        (1 << 32, 0, 1, 1),
        (0, MAX_LAYER + 1, 1, 1),
        (0, 0, 0, 1),
        (0, 0, MAX_ROWS + 1, 1),
        (0, 0, 1, 5),
        (0, 0, 1, 0),
    ],
)
def test_a_request_out_of_range_is_refused_where_it_is_made(numbers: tuple[int, int, int, int]) -> None:
    step, layer, n_rows, copies = numbers
    with pytest.raises(RequestError, match=r"possible|carry"):
        wire.request_bodies(step, layer, 1, n_rows, ActivationForm.F32, copies, b"inputs", 1300)


@pytest.mark.parametrize("length", [0, wire.MAX_INPUT_BYTES + 1])
def test_inputs_beyond_what_datagrams_carry_are_refused(length: int) -> None:
    with pytest.raises(RequestError, match=f"inputs of {length} bytes"):
        wire.request_bodies(1, 1, 1, 1, ActivationForm.F32, 1, bytes(length), 1300)


def test_sums_beyond_what_datagrams_carry_are_refused() -> None:
    with pytest.raises(RequestError, match="use streams"):
        wire.answer_bodies(1, 1, 1, ActivationForm.F32, np.zeros((2, 400_000), np.float32), 0, 1400)
