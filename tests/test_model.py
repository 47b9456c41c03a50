"""What the other parts ask of a model beside logits, each held against doing the same by hand."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.model import Model
from edge_runtime.errors import ContextOverflowError, RequestError
from models.synthetic import SyntheticModel, write_synthetic_gguf

TOKENS = [1, 17, 42, 99, 200, 31, 8]
POSITIONS = list(range(len(TOKENS)))
N_LAYERS = 3
# float16 keys and values turn rounding of 1e-7 into about 1e-4 of the logits' range.
TOLERANCE = 2e-4


def open_model(path: Path, *, n_sequences: int = 6, repack: bool = True) -> tuple[GGUFFile, Model]:
    gguf = GGUFFile(path)
    hyperparameters = read_hyperparameters(gguf)
    return gguf, Model(gguf, hyperparameters, n_cells=256, n_sequences=n_sequences, threads=2, repack=repack)


def shape(quantization: str, n_ff: int = 192) -> SyntheticModel:
    return SyntheticModel(
        n_layers=N_LAYERS, n_embd=64, n_ff=n_ff, n_head=4, n_head_kv=2, n_vocab=300, quantization=quantization
    )


@pytest.fixture(scope="module", params=["F32", "Q4_0"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_synthetic_gguf(path, shape(request.param))
    gguf, model = open_model(path)
    model.cut_neuron_groups(32)
    yield model
    model.close()
    gguf.close()


@pytest.fixture(autouse=True)
def empty_cache(request: pytest.FixtureRequest) -> None:
    if "model" in request.fixturenames:
        clear(request.getfixturevalue("model"))


def clear(model: Model) -> None:
    for sequence in range(model.cells.n_sequences):
        model.cells.remove(sequence)


def logits_of(model: Model, **asked: object) -> np.ndarray:
    clear(model)
    return model.forward(Batch(TOKENS, POSITIONS, **asked)).logits  # type: ignore[arg-type]


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.ptp(wanted)


def test_chosen_rows_give_the_logits_of_those_rows(model: Model) -> None:
    whole = logits_of(model)
    assert whole.shape == (len(TOKENS), 300)
    for wanted in ([6], [0, 3], [5, 1, 0], [6, 5, 4, 3, 2, 1, 0]):
        assert_close(logits_of(model, logits=wanted), whole[wanted])
    assert logits_of(model, logits=[]).shape == (0, 300)


def test_token_by_token_equals_the_whole_prompt(model: Model) -> None:
    whole = logits_of(model)
    clear(model)
    for position, token in enumerate(TOKENS):
        step = model.forward(Batch([token], [position])).logits
        assert_close(step[0], whole[position])


@pytest.mark.parametrize("n_sequences", [2, 3, 4, 5])
def test_sequences_in_one_batch_do_not_see_each_other(model: Model, n_sequences: int) -> None:
    alone = []
    for sequence in range(n_sequences):
        clear(model)
        tokens = np.roll(TOKENS, sequence)
        alone.append(model.forward(Batch(tokens, POSITIONS, 0, [6])).logits[0])
    clear(model)
    for position in POSITIONS:
        tokens = [int(np.roll(TOKENS, sequence)[position]) for sequence in range(n_sequences)]
        together = model.forward(Batch(tokens, [position] * n_sequences, list(range(n_sequences)))).logits
    for found, wanted in zip(together, alone, strict=True):
        assert_close(found, wanted)


def test_layer_ranges_in_turn_equal_one_run(model: Model) -> None:
    whole = logits_of(model)
    clear(model)
    first = model.forward(Batch(TOKENS, POSITIONS, layers=range(2), capture=[Capture("residual", 2)]))
    assert first.logits.shape == (0, 300)
    second = model.forward(Batch(None, POSITIONS, hidden=first.hidden, layers=range(2, N_LAYERS)))
    assert_close(second.logits, whole)


@pytest.mark.parametrize("layer", range(N_LAYERS + 1))
def test_an_added_vector_equals_changing_the_residual_stream(model: Model, layer: int) -> None:
    vector = np.zeros((len(TOKENS), 64), np.float32)
    vector[2] = np.random.default_rng(1).normal(size=64)
    clear(model)
    before = model.forward(
        Batch(TOKENS, POSITIONS, layers=range(layer), capture=[Capture("residual", layer)])
    )
    changed = Batch(None, POSITIONS, hidden=before.hidden + vector, layers=range(layer, N_LAYERS))
    wanted = model.forward(changed).logits
    found = logits_of(model, add={layer: vector})
    assert_close(found, wanted)
    assert np.abs(found - logits_of(model)).max() > 0.01 * np.ptp(wanted)


def test_captures_fit_together(model: Model) -> None:
    kinds = ("residual", "ffn_input", "ffn_activation", "ffn_output")
    clear(model)
    asked = [Capture(kind, 1) for kind in kinds] + [Capture("residual", 2)]
    captured = model.forward(Batch(TOKENS, POSITIONS, logits=[6], capture=asked)).captured
    assert [captured[Capture(kind, 1)].shape[1] for kind in kinds] == [64, 64, 192, 64]
    assert all(values.shape[0] == len(TOKENS) for values in captured.values())
    attention_too = captured[Capture("residual", 2)] - captured[Capture("ffn_output", 1)]
    assert np.isfinite(attention_too).all()


@pytest.mark.parametrize("kind", ["residual", "ffn_input", "ffn_activation", "ffn_output"])
def test_a_capture_is_the_same_after_graphs_that_capture_elsewhere(model: Model, kind: str) -> None:
    """A capture adds no node to a graph, only a tensor that must keep its memory."""

    def captured(layer: int) -> np.ndarray:
        clear(model)
        capture = Capture(kind, layer)  # type: ignore[arg-type]
        return model.forward(Batch(TOKENS, POSITIONS, capture=[capture])).captured[capture]

    alone = [captured(layer) for layer in range(N_LAYERS)]
    for layer in range(N_LAYERS):
        for before in (lambda: logits_of(model), lambda layer=layer: captured((layer + 1) % N_LAYERS)):
            model.set_adapters({})  # drops all graphs
            logits_of(model, groups={0: [0]})  # has other nodes: the next one is planned anew
            before()
            np.testing.assert_array_equal(captured(layer), alone[layer])


def test_all_groups_equal_the_dense_ffn(model: Model) -> None:
    assert model.groups is not None and model.groups.n_groups == 6
    everything = {layer: np.arange(6) for layer in range(N_LAYERS)}
    assert_close(logits_of(model, groups=everything), logits_of(model))


def test_a_chunk_without_logits_takes_what_any_other_takes(model: Model) -> None:
    everything = {layer: np.arange(6) for layer in range(N_LAYERS)}
    vector = np.ones(64, np.float32)
    model.forward(
        Batch(TOKENS[:-1], POSITIONS[:-1], 0, [], groups=everything, fill={2: vector}, add={3: vector})
    )
    found = model.forward(Batch([TOKENS[-1]], [6], groups=everything)).logits[0]
    assert_close(found, logits_of(model)[-1])


def test_contributions_of_groups_add_up(model: Model) -> None:
    def ffn_output(groups: list[int] | None) -> np.ndarray:
        clear(model)
        capture = Capture("ffn_output", 1)
        asked = {} if groups is None else {1: groups}
        return model.forward(Batch(TOKENS, POSITIONS, groups=asked, capture=[capture])).captured[capture]

    parts = ffn_output([4, 0]) + ffn_output([5]) + ffn_output([1, 2, 3])
    assert_close(parts, ffn_output(None))


def test_each_row_may_choose_its_own_groups(model: Model) -> None:
    first, second = [0, 1, 2], [3, 4, 5]
    by_row = np.array([first, second] * 4)[: len(TOKENS)]
    capture = Capture("ffn_output", 0)

    def run(groups: object) -> np.ndarray:
        clear(model)
        return model.forward(Batch(TOKENS, POSITIONS, groups={0: groups}, capture=[capture])).captured[
            capture
        ]  # type: ignore[dict-item]

    found, one, other = run(by_row), run(first), run(second)
    for row in range(len(TOKENS)):
        assert_close(found[row], (one, other)[row % 2][row])


def test_the_fill_stands_in_for_groups_left_out(model: Model) -> None:
    fill = np.random.default_rng(2).normal(size=64).astype(np.float32)
    empty = logits_of(model, groups={1: []})
    added = logits_of(model, groups={1: []}, add={2: fill})
    assert_close(logits_of(model, groups={1: []}, fill={1: fill}), added)
    assert np.abs(added - empty).max() > 0.01 * np.ptp(empty)


def test_perturbed_copies_share_their_prefix(model: Model) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(4, 64)).astype(np.float32)
    alone = [
        logits_of(model, logits=[6], add={1: np.vstack([np.zeros((6, 64)), vector])})[0] for vector in vectors
    ]
    clear(model)
    model.forward(Batch(TOKENS[:-1], POSITIONS[:-1], 0, []))
    for copy in range(1, 5):
        model.cells.copy(0, copy)
    batch = Batch([TOKENS[-1]] * 4, [6] * 4, [1, 2, 3, 4], add={1: vectors})
    for found, wanted in zip(model.forward(batch).logits, alone, strict=True):
        assert_close(found, wanted)


def low_rank(matrix: str, n_in: int, n_out: int, rank: int, seed: int) -> LowRank:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(rank, n_in)) / np.sqrt(n_in)
    b = generator.normal(size=(n_out, rank)) / np.sqrt(n_out)
    return LowRank(matrix, a.astype(np.float32), b.astype(np.float32), 1.5)


MATRICES = {
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (64, 32),
    "blk.1.attn_v.weight": (64, 32),
    "blk.1.attn_output.weight": (64, 64),
    "blk.1.ffn_gate.weight": (64, 192),
    "blk.2.ffn_up.weight": (64, 192),
    "blk.2.ffn_down.weight": (192, 64),
    "output.weight": (64, 300),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_side_path_equals_changed_weights(matrix: str, tmp_path: Path) -> None:
    plain, changed = tmp_path / "plain.gguf", tmp_path / "changed.gguf"
    write_synthetic_gguf(plain, shape("F32"))
    change = low_rank(matrix, *MATRICES[matrix], 3, seed=4)
    with GGUFFile(plain) as gguf:
        record = gguf.tensors[matrix]
        weights = np.frombuffer(gguf.tensor_bytes(matrix), np.float32).reshape(change.b.shape[0], -1)
        content = bytearray(plain.read_bytes())
        content[record.offset : record.offset + record.size] = (
            weights + change.scale * change.b @ change.a
        ).tobytes()
    changed.write_bytes(content)

    results = []
    for path, adapters in ((changed, {}), (plain, {"edit": 1.0}), (plain, {})):
        gguf, model = open_model(path)
        model.set_adapters({"edit": [change]})
        results.append(logits_of(model, adapters=adapters))
        if adapters:
            model.cut_neuron_groups(32)
            groups = {layer: np.arange(6) for layer in range(N_LAYERS)}
            assert_close(logits_of(model, adapters=adapters, groups=groups), results[0])
            assert_close(logits_of(model, adapters=adapters, logits=[6]), results[0][6:])
        model.close()
        gguf.close()
    assert_close(results[1], results[0])
    assert np.abs(results[2] - results[0]).max() > 0.01 * np.ptp(results[0])


def test_each_row_has_its_own_adapters(model: Model) -> None:
    changes = {
        "one": [
            low_rank("blk.0.ffn_down.weight", 192, 64, 1, 5),
            low_rank("blk.2.attn_v.weight", 64, 32, 2, 6),
        ],
        "two": [low_rank("blk.0.ffn_down.weight", 192, 64, 4, 7)],
    }
    model.set_adapters(changes)
    wanted = {}
    for names in ((), ("one",), ("two",), ("one", "two")):
        wanted[names] = logits_of(model, adapters=dict.fromkeys(names, 1.0), logits=[6])[0]
    clear(model)
    for position, token in enumerate(TOKENS):
        found = model.forward(
            Batch(
                [token] * 4, [position] * 4, [0, 1, 2, 3], adapters={"one": [0, 1, 0, 1], "two": [0, 0, 1, 1]}
            )
        ).logits
    for row, names in enumerate(wanted):
        assert_close(found[row], wanted[names])
    model.set_adapters({})


def test_an_odd_width_gets_one_short_last_group(tmp_path: Path) -> None:
    write_synthetic_gguf(tmp_path / "odd.gguf", shape("F32", n_ff=172))
    gguf, model = open_model(tmp_path / "odd.gguf")
    groups = model.cut_neuron_groups(32)
    assert (groups.n_groups, groups.padding) == (6, 20)
    everything = {layer: np.arange(6) for layer in range(N_LAYERS)}
    assert_close(logits_of(model, groups=everything), logits_of(model))
    model.set_adapters(
        {
            "edit": [
                low_rank("blk.0.ffn_gate.weight", 64, 172, 2, 8),
                low_rank("blk.1.ffn_down.weight", 172, 64, 2, 8),
            ]
        }
    )
    assert_close(
        logits_of(model, groups=everything, adapters={"edit": 1}), logits_of(model, adapters={"edit": 1})
    )
    model.close()
    gguf.close()


def test_weights_left_in_the_file_give_the_same_text(tmp_path: Path) -> None:
    write_synthetic_gguf(tmp_path / "model.gguf", shape("Q4_0"))
    results = []
    for repack in (True, False):
        gguf, model = open_model(tmp_path / "model.gguf", repack=repack)
        assert (model.weights.repacked_bytes > 0) == (repack and model.weights.repack_types is not None)
        results.append(logits_of(model))
        model.close()
        gguf.close()
    assert (results[0].argmax(axis=1) == results[1].argmax(axis=1)).all()
    # Kernels of the two layouts sum in different orders.
    assert np.abs(results[0] - results[1]).max() < 0.02 * np.ptp(results[0])


def test_keys_may_be_kept_more_or_less_exactly(tmp_path: Path) -> None:
    model = SyntheticModel(n_layers=2, n_embd=64, n_ff=128, n_head=2, n_head_kv=1, n_vocab=300)
    write_synthetic_gguf(tmp_path / "model.gguf", model)
    results = {}
    for kv_type in ("f32", "f16", "q8_0"):
        with GGUFFile(tmp_path / "model.gguf") as gguf:
            hyperparameters = read_hyperparameters(gguf)
            model = Model(gguf, hyperparameters, n_cells=512, threads=2, kv_type=kv_type)  # type: ignore[assignment]
            results[kv_type] = (logits_of(model), model.kv_bytes)
            model.close()
    assert results["f32"][1] > 1.5 * results["f16"][1] > 2 * results["q8_0"][1]
    exact = results["f32"][0]
    error = {kind: np.abs(logits - exact).max() / np.ptp(exact) for kind, (logits, _) in results.items()}
    assert 0 < error["f16"] < 1e-3 < error["q8_0"] < 0.05


def test_keys_of_odd_heads_are_not_quantized(tmp_path: Path) -> None:
    write_synthetic_gguf(tmp_path / "model.gguf", shape("F32"))
    with GGUFFile(tmp_path / "model.gguf") as gguf, pytest.raises(RequestError, match="heads 16 wide"):
        Model(gguf, read_hyperparameters(gguf), n_cells=64, kv_type="q8_0")


def test_a_full_cache_is_a_clear_error_and_loses_nothing(model: Model) -> None:
    whole = logits_of(model)
    with pytest.raises(ContextOverflowError, match="of 256 are free"):
        model.forward(Batch([5] * 250, list(range(7, 257)), 0, []))
    again = model.forward(Batch([TOKENS[-1]], [6], 0)).logits
    assert_close(again[0], whole[-1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": [1, 2, 300]},
        {"tokens": [1, -1, 3]},
        {"tokens": [1, 2]},
        {"tokens": None},
        {"positions": [0, 1, -2]},
        {"positions": [0, 0, 1]},
        {"sequences": 6},
        {"sequences": [0, -1, 0]},
        {"logits": [3]},
        {"layers": range(4)},
        {"layers": range(2, 1)},
        {"layers": range(0, 3, 2)},
        {"layers": range(2), "logits": [0]},
        {"groups": {0: [6]}},
        {"groups": {0: [-1]}},
        {"groups": {0: [1, 1]}},
        {"groups": {3: [1]}},
        {"groups": {0: np.zeros((2, 1), int)}},
        {"fill": {0: np.zeros(63)}},
        {"add": {4: np.zeros(64)}},
        {"add": {0: np.zeros((2, 64))}},
        {"capture": [Capture("residual", 4)]},
        {"capture": [Capture("ffn_input", 3)]},
        {"capture": [Capture("ffn_output", 0)], "groups": {0: []}},
        {"adapters": {"unknown": 1.0}},
    ],
)
def test_wrong_batches_are_refused(model: Model, wrong: dict[str, object]) -> None:
    batch = {"tokens": [1, 2, 3], "positions": [0, 1, 2]} | wrong
    with pytest.raises(RequestError):
        model.forward(Batch(**batch))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        LowRank("blk.9.ffn_down.weight", np.zeros((1, 192)), np.zeros((64, 1))),
        LowRank("blk.0.ffn_norm.weight", np.zeros((1, 64)), np.zeros((64, 1))),
        LowRank("token_embd.weight", np.zeros((1, 64)), np.zeros((300, 1))),
        LowRank("blk.0.ffn_down.weight", np.zeros((1, 64)), np.zeros((192, 1))),
        LowRank("blk.0.ffn_down.weight", np.zeros((2, 192)), np.zeros((64, 1))),
        LowRank("blk.0.ffn_down.weight", np.full((1, 192), np.nan), np.zeros((64, 1))),
    ],
)
def test_adapters_that_do_not_fit_are_refused(model: Model, change: LowRank) -> None:
    with pytest.raises(RequestError, match="adapter 'wrong'"):
        model.set_adapters({"wrong": [change]})


@pytest.mark.parametrize("size", [0, -32, 12, 7])
def test_group_sizes_that_cut_a_block_are_refused(model: Model, size: int) -> None:
    with pytest.raises(RequestError, match="multiples of"):
        model.cut_neuron_groups(size)
