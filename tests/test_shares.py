"""A model in pieces: what shares, head slices and layer steps give together is what the whole model gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engine import ggml
from edge_runtime.engine.activations import ActivationForm, decode, encode, encoded_bytes, kernel_form
from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.group_slices import GroupSlices, PartitionShape
from edge_runtime.engine.layer_steps import LayerSteps
from edge_runtime.engine.model import Model
from edge_runtime.engine.share_sides import SideStacks, make_side
from edge_runtime.engine.shares import Share, ShareComputer
from edge_runtime.errors import ModelFileError, RequestError
from models.synthetic import SyntheticModel, write_synthetic_gguf

LAYER = 1
TOKENS = [3, 1, 4, 1, 5]
# Sums are taken in another order; quantized activations turn 1e-7 into steps of their own.
TOLERANCE = {"F32": 1e-5, "F16": 1e-5, "Q8_0": 1e-5, "Q4_0": 1e-5, "Q4_K_M": 1e-5}
SHAPES = {
    "F32": {"n_ff": 172},  # the last group is short
    "F16": {"n_ff": 192},
    "Q8_0": {"n_ff": 192},
    "Q4_0": {"n_ff": 192},
    "Q4_K_M": {"n_ff": 768, "n_embd": 256},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pieces(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    kind = request.param
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    shape = {"n_embd": 64, **SHAPES[kind]}
    write_synthetic_gguf(
        path,
        SyntheticModel(
            n_layers=3, n_head=4, n_head_kv=2, n_vocab=1100, n_ctx=128, quantization=kind, **shape
        ),
    )
    gguf = GGUFFile(path)
    hyperparameters = read_hyperparameters(gguf)
    whole = Model(gguf, hyperparameters, n_cells=128, n_sequences=4)
    cut = Model(gguf, hyperparameters, n_cells=128, n_sequences=4, ffn=False, head=False)
    slices = GroupSlices(gguf, hyperparameters)
    computer = ShareComputer(slices.shape, cut.backend)
    steps = LayerSteps(cut)
    yield SimpleNamespace(
        kind=kind, gguf=gguf, whole=whole, cut=cut, slices=slices, computer=computer, steps=steps
    )
    steps.close()
    computer.close()
    whole.close()
    cut.close()
    gguf.close()


def share_of(pieces: SimpleNamespace, layer: int, groups: list[int]) -> Share:
    return pieces.computer.share(layer, {group: pieces.slices.group(layer, group) for group in groups})


def captured(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """What the layer's FFN takes and gives."""
    model.cells.remove(0)
    asked = [Capture("ffn_input", LAYER), Capture("ffn_output", LAYER)]
    result = model.forward(Batch(TOKENS, list(range(len(TOKENS))), capture=asked)).captured
    model.cells.remove(0)
    return result[asked[0]], result[asked[1]]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_shares_add_up_to_the_ffn(pieces: SimpleNamespace, n_parts: int) -> None:
    inputs, expected = captured(pieces.whole)
    total = np.zeros_like(expected)
    for part in range(n_parts):
        groups = list(range(part, pieces.slices.shape.n_groups, n_parts))
        with closing(share_of(pieces, LAYER, groups)) as share:
            assert share.nbytes == sum(pieces.slices.shape.group_bytes(LAYER, group) for group in groups)
            total += pieces.computer.compute(share, inputs)
    assert error(total, expected) < TOLERANCE[pieces.kind]


def test_a_share_in_the_file_gives_what_one_in_memory_gives(pieces: SimpleNamespace) -> None:
    inputs, _ = captured(pieces.whole)
    groups = tuple(range(1, pieces.slices.shape.n_groups, 2))
    if pieces.kind == "F32":
        with pytest.raises(RequestError, match="short"):
            pieces.computer.mapped_share(pieces.gguf, LAYER, groups)
        return
    with (
        closing(share_of(pieces, LAYER, list(groups))) as held,
        closing(pieces.computer.mapped_share(pieces.gguf, LAYER, groups)) as there,
    ):
        expected = pieces.computer.compute(held, inputs).copy()
        assert there.nbytes == 0
        assert error(pieces.computer.compute(there, inputs), expected) < TOLERANCE[pieces.kind]


def test_graphs_of_several_shares_and_row_counts_do_not_disturb_each_other(pieces: SimpleNamespace) -> None:
    inputs, _ = captured(pieces.whole)
    groups = list(range(pieces.slices.shape.n_groups))
    with closing(share_of(pieces, LAYER, groups[::2])) as one, closing(share_of(pieces, 0, groups)) as two:
        first = pieces.computer.compute(one, inputs[:1]).copy()
        pieces.computer.compute(two, np.repeat(inputs, 20, axis=0))  # moves the buffer of all graphs
        for n_rows in (1, 2, 3, 4, 5):
            found = pieces.computer.compute(one, inputs[:n_rows]).copy()
            assert np.array_equal(found[:1], first) or error(found[:1], first) < TOLERANCE[pieces.kind]


def test_head_slices_are_rows_of_the_logits(pieces: SimpleNamespace) -> None:
    shape = pieces.slices.shape
    assert shape.n_head_slices == 2 and shape.slice_rows(1) == 1100 - 1024
    pieces.whole.cells.remove(0)
    expected = pieces.whole.forward(Batch(TOKENS[:1], [0])).logits
    pieces.whole.cells.remove(0)
    hidden = pieces.steps.begin(Batch(TOKENS[:1], [0]))
    for layer in range(shape.n_layers):
        hidden = through(pieces, layer, hidden)
    inputs = pieces.steps.head_input(hidden)
    pieces.cut.cells.remove(0)
    contents = {number: pieces.slices.head_slice(number) for number in range(2)}
    with closing(pieces.computer.head_share(contents)) as head:
        assert error(pieces.computer.compute(head, inputs), expected) < 1e-3
    for number, rows in ((0, slice(0, 1024)), (1, slice(1024, 1100))):
        with (
            closing(pieces.computer.head_share({number: contents[number]})) as held,
            closing(pieces.computer.mapped_head(pieces.gguf, pieces.slices.head_name, (number,))) as there,
        ):
            part = pieces.computer.compute(held, inputs).copy()
            assert error(part, expected[:, rows]) < 1e-3
            assert error(pieces.computer.compute(there, inputs), part) < TOLERANCE[pieces.kind]


def through(pieces: SimpleNamespace, layer: int, hidden: np.ndarray) -> np.ndarray:
    residual, ffn_input = pieces.steps.attention(layer, hidden)
    residual = residual.copy()
    with closing(share_of(pieces, layer, list(range(pieces.slices.shape.n_groups)))) as share:
        return residual + pieces.computer.compute(share, ffn_input)


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_layer_steps_give_the_logits_of_a_forward_pass(pieces: SimpleNamespace, n_rows: int) -> None:
    positions = list(range(n_rows))
    expected = pieces.whole.forward(Batch(TOKENS[:n_rows], positions)).logits
    hidden = pieces.steps.begin(Batch(TOKENS[:n_rows], positions))
    for layer in range(pieces.slices.shape.n_layers):
        hidden = through(pieces, layer, hidden)
    found = pieces.steps.logits(hidden)
    pieces.whole.cells.remove(0)
    pieces.cut.cells.remove(0)
    # float16 keys and values turn 1e-7 into about 1e-4 of the range.
    assert error(found, expected) < (2e-2 if pieces.kind.startswith("Q") else 1e-3)


def test_layer_steps_take_several_sequences_and_some_logits(pieces: SimpleNamespace) -> None:
    batch = Batch([7, 8, 9], [0, 0, 1], np.array([0, 1, 1], np.int32), [2])
    expected = pieces.whole.forward(batch).logits
    hidden = pieces.steps.begin(batch)
    for layer in range(pieces.slices.shape.n_layers):
        hidden = through(pieces, layer, hidden)
    found = pieces.steps.logits(hidden)
    for model in (pieces.whole, pieces.cut):
        for sequence in (0, 1):
            model.cells.remove(sequence)
    assert found.shape == expected.shape == (1, 1100)
    assert error(found, expected) < (2e-2 if pieces.kind.startswith("Q") else 1e-3)


def test_layer_steps_apply_adapters_of_attention(pieces: SimpleNamespace) -> None:
    if pieces.kind != "F32":
        pytest.skip("the arithmetic is the same for all types")
    rng = np.random.default_rng(0)
    low = LowRank(
        "blk.0.attn_q.weight",
        rng.standard_normal((2, 64)).astype(np.float32),
        rng.standard_normal((64, 2)).astype(np.float32),
    )
    for model in (pieces.whole, pieces.cut):
        model.set_adapters({"edit": [low]})
    batch = Batch(TOKENS, list(range(5)), adapters={"edit": 0.5})
    expected = pieces.whole.forward(batch).logits
    hidden = pieces.steps.begin(batch)
    for layer in range(pieces.slices.shape.n_layers):
        hidden = through(pieces, layer, hidden)
    found = pieces.steps.logits(hidden)
    for model in (pieces.whole, pieces.cut):
        model.set_adapters({})
        model.cells.remove(0)
    assert error(found, expected) < 1e-3


# --- side paths -------------------------------------------------------------------------------

ADAPTERS = {
    "all": ["ffn_gate", "ffn_up", "ffn_down"],
    "gate": ["ffn_gate"],
    "up": ["ffn_up"],
    "down": ["ffn_down"],
}


def adapters_of(pieces: SimpleNamespace) -> dict[str, list[LowRank]]:
    """Those of `ADAPTERS` on one layer, each of another rank, and one on the head."""
    shape, random = pieces.slices.shape, np.random.default_rng(2)

    def low_rank(matrix: str, n_in: int, n_out: int, rank: int) -> LowRank:
        a, b = (random.standard_normal(size).astype(np.float32) for size in ((rank, n_in), (n_out, rank)))
        return LowRank(matrix, a, b, 0.3 / np.sqrt(n_in))

    found = {
        name: [
            low_rank(f"blk.{LAYER}.{kind}.weight", *sizes[:: -1 if kind == "ffn_down" else 1], rank)
            for kind in kinds
        ]
        for rank, (name, kinds) in enumerate(ADAPTERS.items(), start=1)
        for sizes in [(shape.n_embd, shape.n_ff)]
    }
    found["head"] = [low_rank("output.weight", shape.n_embd, shape.n_vocab, 2)]
    return found


def side_values(
    pieces: SimpleNamespace, stacks: SideStacks, layer: int, inputs: np.ndarray, **of: object
) -> object:
    strengths = {name: np.broadcast_to(np.float32(value), (len(inputs),)) for name, value in of.items()}  # type: ignore[arg-type]
    a = stacks.projection(layer)
    if a is None:
        return stacks.values(layer, None, strengths)
    with closing(pieces.computer.projection(a)) as projection:
        return stacks.values(layer, pieces.computer.compute(projection, inputs), strengths)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", [*ADAPTERS, "two"])
def test_side_paths_of_shares_add_up_to_the_whole_models(
    pieces: SimpleNamespace, name: str, in_file: bool
) -> None:
    if in_file and pieces.kind == "F32":
        pytest.skip("a short last group lies in no file")
    adapters, shape = adapters_of(pieces), pieces.slices.shape
    wish = {"up": 1.0, "down": [0.0, 1.0, -2.0, 0.5, 0.0]} if name == "two" else {name: 0.7}
    pieces.whole.set_adapters(adapters)
    asked = [Capture("ffn_input", LAYER), Capture("ffn_output", LAYER)]
    pieces.whole.cells.remove(0)
    result = pieces.whole.forward(Batch(TOKENS, list(range(5)), capture=asked, adapters=wish)).captured
    pieces.whole.cells.remove(0)
    pieces.whole.set_adapters({})
    inputs, expected = result[asked[0]], result[asked[1]]

    stacks = SideStacks(adapters, shape)
    assert stacks.layers == [LAYER, shape.n_layers] and stacks.width(LAYER) == 3 * 1 + 2 + 3 + 4
    values = side_values(pieces, stacks, LAYER, inputs, **wish)
    total, plain = np.zeros_like(expected), np.zeros_like(expected)
    for part in range(2):
        groups = list(range(part, shape.n_groups, 2))
        made = (
            pieces.computer.mapped_share(pieces.gguf, LAYER, tuple(groups))
            if in_file
            else share_of(pieces, LAYER, groups)
        )
        with closing(made) as share:
            side = pieces.computer.side(share, stacks.matrices(LAYER, groups))
            plain += pieces.computer.compute(share, inputs)
            total += pieces.computer.compute(share, inputs, side, values)
            share.drop_side(side)
            share.drop_side(side)
            assert not any(key[1] for key in share.graphs)
    assert error(total, expected) < TOLERANCE[pieces.kind]
    assert error(plain, expected) > 0.01


def test_side_paths_of_the_heads_slices_are_the_whole_heads(pieces: SimpleNamespace) -> None:
    adapters, shape = adapters_of(pieces), pieces.slices.shape
    random = np.random.default_rng(4)
    inputs = random.standard_normal((2, shape.n_embd)).astype(np.float32)
    change = adapters["head"][0]
    stacks = SideStacks(adapters, shape)
    values = side_values(pieces, stacks, shape.n_layers, inputs, head=[1.0, -0.5])
    expected = np.array([[1.0], [-0.5]]) * change.scale * (inputs @ change.a.T) @ change.b.T
    for number, rows in ((0, slice(0, 1024)), (1, slice(1024, 1100))):
        for make in (
            lambda n: pieces.computer.head_share({n: pieces.slices.head_slice(n)}),
            lambda n: pieces.computer.mapped_head(pieces.gguf, pieces.slices.head_name, (n,)),
        ):
            with closing(make(number)) as share:
                side = pieces.computer.side(share, stacks.matrices(shape.n_layers, (number,)))
                plain = pieces.computer.compute(share, inputs).copy()
                found = pieces.computer.compute(share, inputs, side, values) - plain
                assert np.abs(found - expected[:, rows]).max() < 1e-5 * np.abs(plain).max()
                share.drop_side(side)


def test_what_is_switched_off_has_no_side_values(pieces: SimpleNamespace) -> None:
    shape = pieces.slices.shape
    stacks = SideStacks(adapters_of(pieces), shape)
    inputs = np.ones((2, shape.n_embd), np.float32)
    assert side_values(pieces, stacks, LAYER, inputs, head=1.0) is None
    assert side_values(pieces, stacks, LAYER, inputs, up=[0.0, 0.0]) is None
    assert side_values(pieces, stacks, 0, inputs, up=1.0) is None
    assert stacks.values(LAYER, None, {}) is None
    assert not stacks.matrices(0, (0,)) and stacks.projection(0) is None


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"gate": (8, 0)},
        {"gate": (9, 2)},
        {"up": (8, 2), "head": (8, 2)},
        {"down_a": (2, 8)},
        {"down_a": (2, 8), "down_b": (8, 2)},
        {"down_a": (2, 9), "down_b": (64, 2)},
        {"gate": (8, 5000)},
        {"gate": (16,)},
    ],
)
def test_side_paths_that_do_not_fit_a_share_are_refused(damage: dict[str, tuple[int, ...]]) -> None:
    shape = PartitionShape("llama", 64, 16, 1, 10, 8, ((0, 0, 0),), 0)
    with pytest.raises(RequestError):
        make_side({name: np.zeros(size, np.float32) for name, size in damage.items()}, shape, 8, head=False)
    with pytest.raises(RequestError, match="finite"):
        make_side({"gate": np.full((8, 1), np.inf, np.float32)}, shape, 8, head=False)


@pytest.mark.parametrize(
    "asked", [{"groups": {0: [0]}}, {"capture": [Capture("residual", 0)]}, {"layers": range(1)}]
)
def test_layer_steps_refuse_what_they_cannot_do(pieces: SimpleNamespace, asked: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="layer by layer"):
        pieces.steps.begin(Batch([1], [0], **asked))  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["short", "group", "layer", "none"])
def test_shares_of_wrong_bytes_are_refused(pieces: SimpleNamespace, damage: str) -> None:
    content = pieces.slices.group(0, 0)
    layer, groups = {
        "short": (0, {0: content[:-1]}),
        "group": (0, {99: content}),
        "layer": (7, {0: content}),
        "none": (0, {}),
    }[damage]
    with pytest.raises(RequestError):
        pieces.computer.share(layer, groups)
    with pytest.raises(RequestError):
        pieces.computer.head_share({0: b"too few"} if damage == "short" else {9: b""})


# --- shapes -----------------------------------------------------------------------------------


def test_a_shape_survives_json(pieces: SimpleNamespace) -> None:
    shape = pieces.slices.shape
    assert PartitionShape.from_json(json.loads(json.dumps(shape.as_json()))) == shape


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_hostile_shape_is_refused_or_sound(data: st.DataObject) -> None:
    names = list(PartitionShape.__slots__)
    values: dict[str, object] = {
        "architecture": "llama",
        "n_embd": 64,
        "n_ff": 192,
        "n_layers": 1,
        "n_vocab": 100,
        "group_size": 32,
        "types": [[2, 2, 2]],
        "head_type": 2,
        "head_slice_rows": 10,
    }
    name = data.draw(st.sampled_from([*names, "extra"]))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.lists(st.integers()))
    )
    values[name] = data.draw(anything)
    try:
        shape = PartitionShape.from_json(values)
    except ModelFileError:
        return
    assert shape.n_groups >= 1 and sum(map(shape.neurons, range(min(shape.n_groups, 1000)))) <= shape.n_ff
    assert all(shape.group_bytes(layer, 0) > 0 for layer in range(shape.n_layers))


def test_types_that_no_kernel_multiplies_are_refused() -> None:
    with pytest.raises(ModelFileError, match="cannot be cut"):
        PartitionShape("llama", 64, 64, 1, 10, 32, ((24, 24, 24),), 24)


# --- vectors on their way ---------------------------------------------------------------------


@pytest.mark.parametrize("form", list(ActivationForm))
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_encoding_what_was_decoded_gives_the_same_again(form: ActivationForm, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((3, 512)) * 10.0 ** rng.uniform(-4, 4, (3, 1))).astype(np.float32)
    content = encode(form, values)
    assert len(content) == encoded_bytes(form, 3, 512)
    decoded = decode(form, content, 3, 512)
    again = encode(form, decoded)
    if form is ActivationForm.Q8_K:  # its float32 scales come back but for the last bit
        assert np.allclose(decode(form, again, 3, 512), decoded, rtol=1e-6, atol=0)
    else:
        assert again == content


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "F16"])
def test_a_kernel_computes_the_same_from_what_travelled(pieces: SimpleNamespace, kind: str) -> None:
    if pieces.kind != kind:
        pytest.skip("another type's turn")
    inputs, _ = captured(pieces.whole)
    form = kernel_form(pieces.slices.shape.types[LAYER][0])
    assert form is not ActivationForm.F32
    with closing(share_of(pieces, LAYER, [0])) as share:
        expected = pieces.computer.compute(share, inputs).copy()
        travelled = decode(form, encode(form, inputs), *inputs.shape)
        assert error(pieces.computer.compute(share, travelled), expected) < 1e-6


def test_forms_refuse_wrong_sizes() -> None:
    with pytest.raises(RequestError, match="multiple of 32"):
        encode(ActivationForm.Q8_0, np.zeros((1, 33), np.float32))
    with pytest.raises(RequestError, match="needed are 34"):
        decode(ActivationForm.Q8_0, b"", 1, 32)
    assert kernel_form(ggml.TYPE_F32) is ActivationForm.F32
