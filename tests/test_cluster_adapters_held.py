"""A version of the adapters on its way to a worker, and what the worker holds of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from cluster_fixture import FLOATS, MODEL, Spread, plan_of, spread, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cluster_adapters import ADAPTERS

from edge_runtime.cluster import side_parts
from edge_runtime.cluster.exchange import RefusalReason, RefusedError, content_of
from edge_runtime.cluster.held_shares import HeldShares
from edge_runtime.cluster.prepared_adapters import PreparedAdapters
from edge_runtime.cluster.side_parts import SideParts, messages_for
from edge_runtime.engine.activations import ActivationForm, encode
from edge_runtime.errors import OutOfMemoryError, RequestError
from edge_runtime.v1 import cluster_pb2 as wire

LAYER = 1  # that the edit changes
ROW = np.linspace(-1, 1, FLOATS.n_embd, dtype=np.float32)[None]
SCALE = np.ones((1, 1), np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spread]:
    with spread(write_model(tmp_path_factory.mktemp("floats")), context=64) as spreading:
        yield spreading


@pytest.fixture
def held(made: Spread) -> HeldShares:
    """A worker's, with half of each layer and of the head under plan 1, and nothing else."""
    made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    made.apply({})
    return made.node(1).held


def edit(made: Spread, version: int) -> PreparedAdapters:
    assert made.coordinator is not None
    shares = made.coordinator.plan_shares
    return PreparedAdapters({"edit": ADAPTERS["edit"]}, version, made.shape, shares, made.computer)


def load(made: Spread, version: int) -> None:
    prepared = edit(made, version)
    made.node(1).prepare_adapters(prepared, 1)
    prepared.close()


def ask(held: HeldShares, version: int | None, plan: int = 1, layer: int = LAYER) -> np.ndarray:
    inputs = encode(ActivationForm.F32, ROW)
    content = inputs if version is None else content_of(inputs, version, SCALE)
    return held.compute(plan, layer, 1, content).copy()


def reason(held: HeldShares, content: bytes, plan: int = 1, layer: int = LAYER) -> RefusalReason:
    with pytest.raises(RefusedError) as refused:
        held.compute(plan, layer, 1, content)
    return refused.value.reason


# --- what is held -----------------------------------------------------------------------------


def test_a_request_gets_the_version_that_it_names(made: Spread, held: HeldShares) -> None:
    plain = ask(held, None)
    load(made, 5)
    edited = ask(held, 5)
    assert np.abs(edited - plain).max() > 0.01
    np.testing.assert_array_equal(ask(held, None), plain)
    assert reason(held, content_of(encode(ActivationForm.F32, ROW), 6, SCALE)) is RefusalReason.ADAPTERS


def test_the_version_in_force_stays_while_the_next_one_is_prepared(made: Spread, held: HeldShares) -> None:
    load(made, 5)
    size = held.side_bytes
    edited = ask(held, 5)
    load(made, 6)
    assert held.side_bytes == 2 * size > 0
    np.testing.assert_array_equal(ask(held, 5), edited)
    np.testing.assert_array_equal(ask(held, 6), edited)  # the first that is asked for replaces those before
    assert reason(held, content_of(encode(ActivationForm.F32, ROW), 5, SCALE)) is RefusalReason.ADAPTERS
    assert held.side_bytes == size


def test_no_more_than_two_versions_are_held(made: Spread, held: HeldShares) -> None:
    load(made, 5)
    load(made, 6)
    size = held.side_bytes
    load(made, 7)
    assert held.side_bytes == size
    load(made, 7)  # again, after a break
    assert held.side_bytes == size
    ask(held, 6), ask(held, 7)


def test_versions_go_with_their_plan(made: Spread, held: HeldShares) -> None:
    load(made, 5)
    same = plan_of(made.shape, (1, 1), head=(1, 2))
    made.node(1).prepare(same, 1)  # as after a restart of the coordinator, which counts anew
    assert reason(held, content_of(encode(ActivationForm.F32, ROW), 5, SCALE)) is RefusalReason.ADAPTERS
    load(made, 5)
    for number in (2, 3):
        made.node(1).prepare(plan_of(made.shape, (1, 1), number=number), 1)
    assert reason(held, content_of(encode(ActivationForm.F32, ROW), 5, SCALE)) is RefusalReason.PLAN
    with pytest.raises(RequestError, match="plan 1 is not prepared here"):
        held.widths(1)
    with pytest.raises(RequestError, match="nothing of layer 1"):
        held.load_adapters(1, 5, {LAYER: {"gate": np.zeros((32, 1), np.float32)}})


@pytest.mark.parametrize("more", [b"\1", b"\5\0\0", b"\5\0\0\0", b"\5\0\0\0" + bytes(3), bytes(4) + bytes(8)])
def test_side_values_of_a_wrong_length_are_refused(made: Spread, held: HeldShares, more: bytes) -> None:
    load(made, 5)
    found = reason(held, encode(ActivationForm.F32, ROW) + more)
    assert found in (RefusalReason.INVALID, RefusalReason.ADAPTERS)


def test_a_layer_without_side_path_takes_no_side_values(made: Spread, held: HeldShares) -> None:
    load(made, 5)
    content = content_of(encode(ActivationForm.F32, ROW), 5, SCALE)
    assert reason(held, content, layer=0) is RefusalReason.INVALID


# --- on the way -------------------------------------------------------------------------------


def parts_of(made: Spread, message: wire.PrepareAdaptersRequest, most_bytes: int = 1 << 20) -> SideParts:
    return SideParts(message, made.shape, made.node(1).held.widths(1), most_bytes)


@pytest.mark.parametrize("size", [4, 1000, 1 << 20])
def test_matrices_arrive_as_they_were_cut(
    made: Spread, held: HeldShares, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(side_parts, "MESSAGE_BYTES", size)
    assert made.coordinator is not None
    shares = made.coordinator.plan_shares
    adapters = {"edit": ADAPTERS["edit"]} if size == 4 else ADAPTERS
    prepared = PreparedAdapters(adapters, 3, made.shape, shares, made.computer)
    messages = list(messages_for(MODEL, prepared, 1))
    parts = parts_of(made, messages[0])
    for message in messages:
        assert sum(len(part.content) for part in message.parts) <= size
        parts.add(wire.PrepareAdaptersRequest.FromString(message.SerializeToString()))
    found = parts.matrices()
    assert found.keys() == set(prepared.layers)
    for layer, matrices in found.items():
        wanted = prepared.matrices(layer, 1)
        assert matrices.keys() == wanted.keys()
        for name, values in matrices.items():
            np.testing.assert_array_equal(values, wanted[name])
    prepared.close()


def test_a_worker_gets_its_columns_alone(made: Spread, held: HeldShares) -> None:
    prepared = edit(made, 3)
    plan = prepared.shares.plan
    (change,) = ADAPTERS["edit"]
    size = made.shape.group_size
    columns = np.concatenate([np.arange(g * size, (g + 1) * size) for g in plan.groups[LAYER][1]])
    matrices = prepared.matrices(LAYER, 1)
    np.testing.assert_array_equal(matrices["down_a"], change.a[:, columns])
    np.testing.assert_array_equal(matrices["down_b"], change.b)
    assert list(messages_for(MODEL, prepared, 1))
    prepared.close()


def test_a_worker_without_part_in_it_gets_nothing(made: Spread) -> None:
    plan = plan_of(made.shape, (1, 1))
    groups = tuple((nodes[0] + nodes[1], ()) if n == LAYER else nodes for n, nodes in enumerate(plan.groups))
    made.use(replace(plan, groups=groups))
    prepared = edit(made, 3)
    assert not list(messages_for(MODEL, prepared, 1))
    prepared.close()
    made.apply({})


def test_more_than_is_lent_is_refused(made: Spread, held: HeldShares) -> None:
    prepared = edit(made, 3)
    (message,) = messages_for(MODEL, prepared, 1)
    prepared.close()
    with pytest.raises(OutOfMemoryError, match="lend_memory_mb"):
        parts_of(made, message, most_bytes=100).add(message)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_a_peer_sends_is_refused_or_fits(made: Spread, data: st.DataObject) -> None:
    if made.coordinator is None:
        made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    held = made.node(1).held
    widths = held.widths(1)
    layers = st.sampled_from([0, 1, FLOATS.n_layers, FLOATS.n_layers + 1])
    part = st.builds(
        wire.SidePart,
        layer=layers,
        matrix=st.integers(0, 7),
        rank=st.sampled_from([0, 1, 2, 3, 4096, 4097, 1 << 31]),
        content=st.sampled_from(
            [b"", bytes(4), bytes(4 * 1024), b"\xff" * 512, bytes(4 * max(widths.values()))]
        ),
    )
    request = st.builds(
        wire.PrepareAdaptersRequest,
        model=st.just(MODEL),
        plan=st.just(1),
        version=st.integers(1, 3),
        parts=st.lists(part, max_size=4),
    )
    requests = data.draw(st.lists(request, min_size=1, max_size=3))
    parts = SideParts(requests[0], made.shape, widths, 1 << 16)
    try:
        for one in requests:
            parts.add(one)
        matrices = parts.matrices()
        held.load_adapters(1, 77, matrices)
    except (RequestError, OutOfMemoryError):
        return
    assert parts.nbytes <= 1 << 16
    for layer in matrices:
        assert layer in widths
