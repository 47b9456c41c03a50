"""Adapters by request: each answer is what an engine gives that never knew any other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engine.adapters import Adapters, LowRank, version_of
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.embedding import embed
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.generation import Generation
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import AdapterNotFoundError, RequestError
from models.synthetic import SyntheticModel, write_synthetic_gguf

GREEDY = SamplingParameters(temperature=0)
PROMPT = "A small computer on a windowsill, and what it said to the lamp beside it in the evening"
N_EMBD, N_FF = 64, 128
COUNT = 24


def change(matrix: str, n_in: int, n_out: int, rank: int, seed: int) -> LowRank:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, n_in)), random.standard_normal((n_out, rank))
    return LowRank(matrix, a.astype(np.float32), b.astype(np.float32), 0.5)


ONE = [change("blk.0.ffn_down.weight", N_FF, N_EMBD, 1, 1)]
TWO = [
    change("blk.0.ffn_gate.weight", N_EMBD, N_FF, 2, 2),
    change("blk.1.attn_output.weight", N_EMBD, N_EMBD, 3, 3),
]
OTHER_ONE = [change("blk.0.ffn_down.weight", N_FF, N_EMBD, 1, 4)]
BOTH: Adapters = {"one": ONE, "two": TWO}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.gguf"
    model = SyntheticModel(
        n_layers=2, n_embd=N_EMBD, n_ff=N_FF, n_head=4, n_head_kv=2, n_vocab=300, n_ctx=256
    )
    write_synthetic_gguf(path, model)
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    with Engine.load(path, EngineOptions(threads=1, sequences=3, batch=16)) as engine:
        yield engine


def tokens_of(generation: Generation) -> list[int]:
    return [token for piece in generation for token in piece.tokens]


def begun(engine: Engine, wanted: dict[str, float] | None, prompt: str = PROMPT) -> Generation:
    return engine.generate(prompt, sampling=GREEDY, max_tokens=COUNT, adapters=wanted)


def fresh(path: Path, adapters: Adapters, wanted: dict[str, float], prompt: str = PROMPT) -> list[int]:
    """What an engine answers that has just been loaded."""
    with Engine.load(path, EngineOptions(threads=1, batch=16)) as engine:
        engine.set_adapters(adapters)
        return tokens_of(begun(engine, wanted, prompt))


def test_an_answer_is_a_fresh_engines_whatever_was_asked_before(engine: Engine, path: Path) -> None:
    engine.set_adapters(BOTH)
    wishes: list[dict[str, float]] = [{}, {"one": 1}, {"two": 1}, {"one": 1, "two": 1}, {"one": 0.3}]
    expected = [fresh(path, BOTH, wish) for wish in wishes]
    assert len(set(map(tuple, expected))) == len(wishes)
    for _ in range(2):
        for wish, tokens in zip(wishes, expected, strict=True):
            assert tokens_of(begun(engine, wish)) == tokens


def test_a_prefix_is_reused_under_the_same_adapters_alone(engine: Engine) -> None:
    engine.set_adapters(BOTH)
    reused = []
    for wish in ({}, {}, {"one": 1.0}, {"one": 1.0}, {"one": 0.5}, {"two": 1.0}, {"two": 1.0}):
        generation = begun(engine, wish)
        tokens_of(generation)
        reused.append(generation.reused_tokens)
    whole = generation.prompt_tokens - 1
    assert reused == [0, whole, 0, whole, 0, 0, whole]


def test_cells_of_a_busy_place_are_shared_under_the_same_adapters_alone(engine: Engine, path: Path) -> None:
    engine.set_adapters(BOTH)
    running = begun(engine, {"one": 1})
    next(running)
    plain, edited = begun(engine, {}), begun(engine, {"one": 1})
    assert tokens_of(plain) == fresh(path, BOTH, {})
    assert tokens_of(edited) == fresh(path, BOTH, {"one": 1})
    assert (plain.reused_tokens, edited.reused_tokens) == (0, edited.prompt_tokens - 1)


def test_answers_in_one_batch_each_have_their_own(engine: Engine, path: Path) -> None:
    engine.set_adapters(BOTH)
    wishes = [{}, {"one": 1.0}, {"one": 0.5, "two": 1.0}]
    prompt = engine.tokenizer.encode(PROMPT)
    answers = [engine.decoding(prompt, sampling=GREEDY, max_tokens=COUNT, adapters=wish) for wish in wishes]
    found: list[list[int]] = [[] for _ in answers]
    batches: list[Batch] = []

    def forward(batch: Batch, decodings: object) -> Result:
        batches.append(batch)
        return engine.model.forward(batch)

    engine.forward_pass = forward
    assert all(engine.begin(answer) for answer in answers)
    while any(answer.finish_reason is None for answer in answers):
        for answer, piece in engine.advance([one for one in answers if one.finish_reason is None]):
            found[answers.index(answer)] += piece.tokens
    assert found == [fresh(path, BOTH, wish) for wish in wishes]
    strengths = next(batch.adapters for batch in batches if len(batch.positions) == 3)
    one, two = version_of(ONE), version_of(TWO)
    assert {name: list(rows) for name, rows in strengths.items()} == {one: [0, 1, 0.5], two: [0, 0, 1]}


def test_without_adapters_in_use_the_plain_graph_computes(engine: Engine) -> None:
    batches: list[Batch] = []

    def forward(batch: Batch, decodings: object) -> Result:
        batches.append(batch)
        return engine.model.forward(batch)

    engine.forward_pass = forward
    engine.set_adapters(BOTH)
    tokens_of(begun(engine, {}))
    tokens_of(begun(engine, {"one": 0.0}))
    engine.probe()
    assert batches and not any(batch.adapters for batch in batches)


def test_none_means_all_that_are_applied_when_it_begins(engine: Engine, path: Path) -> None:
    engine.set_adapters({"two": TWO})
    generation = begun(engine, None)
    engine.set_adapters(BOTH)
    assert tokens_of(generation) == fresh(path, BOTH, {"one": 1, "two": 1})
    assert engine.applied.names == ("one", "two")


@pytest.mark.parametrize("then", [{"one": OTHER_ONE, "two": TWO}, {"two": TWO}, {}])
def test_an_answer_ends_with_the_versions_it_began_with(engine: Engine, path: Path, then: Adapters) -> None:
    engine.set_adapters(BOTH)
    running = begun(engine, {"one": 1.0})
    plain = begun(engine, {})
    found = [token for _ in range(5) for token in next(running).tokens]
    found_plain = [token for _ in range(5) for token in next(plain).tokens]
    engine.set_adapters(then)
    if "one" in then:
        assert tokens_of(begun(engine, {"one": 1.0})) == fresh(path, then, {"one": 1.0})
    assert found + tokens_of(running) == fresh(path, BOTH, {"one": 1.0})
    assert found_plain + tokens_of(plain) == fresh(path, BOTH, {})


def test_versions_nobody_uses_any_more_are_freed_with_their_cells(engine: Engine) -> None:
    engine.set_adapters({"one": ONE})
    running = begun(engine, {"one": 1})
    next(running)
    engine.set_adapters({"one": OTHER_ONE})
    bank = engine.model.adapters
    assert bank is not None and bank.names == {version_of(ONE), version_of(OTHER_ONE)}
    running.close()
    tokens_of(begun(engine, {}))
    bank = engine.model.adapters
    assert bank is not None and bank.names == {version_of(OTHER_ONE)}
    assert not any(place.tokens for place in engine.places if place.under)


def test_the_same_changes_again_keep_graphs_and_prefixes(engine: Engine) -> None:
    engine.set_adapters({"one": ONE})
    tokens_of(begun(engine, {"one": 1}))
    bank = engine.model.adapters
    engine.set_adapters({"renamed": [LowRank(c.matrix, c.a.copy(), c.b.copy(), c.scale) for c in ONE]})
    assert engine.model.adapters is bank
    again = begun(engine, {"renamed": 1})
    tokens_of(again)
    assert again.reused_tokens == again.prompt_tokens - 1


def test_two_names_for_the_same_changes_add_up(engine: Engine, path: Path) -> None:
    engine.set_adapters({"one": ONE, "again": ONE})
    assert tokens_of(begun(engine, None)) == fresh(path, BOTH, {"one": 2.0})


def test_after_all_are_undone_the_logits_are_bit_for_bit_those_before(engine: Engine) -> None:
    batch = Batch([5, 6, 7], [0, 1, 2])
    before = engine.model.forward(batch).logits
    engine.set_adapters(BOTH)
    tokens_of(begun(engine, None))
    engine.set_adapters({})
    for place in engine.places:
        engine.model.cells.remove(place.number)
    np.testing.assert_array_equal(engine.model.forward(batch).logits, before)


def test_probing_disturbs_no_edited_prefix(engine: Engine) -> None:
    engine.set_adapters(BOTH)
    tokens_of(begun(engine, {"one": 1}))
    place = next(place for place in engine.places if place.tokens)
    after = len(place.tokens)

    def next_logits() -> np.ndarray:
        batch = Batch([7], [after], place.number, adapters={version_of(ONE): 1.0})
        logits = engine.model.forward(batch).logits
        engine.model.cells.remove(place.number, after)
        return logits

    before = next_logits()
    engine.probe()
    np.testing.assert_array_equal(next_logits(), before)


def test_embeddings_are_the_plain_models(engine: Engine, path: Path) -> None:
    prompt = engine.tokenizer.encode(PROMPT)
    plain = embed(engine, prompt)
    engine.set_adapters(BOTH)
    expected = tokens_of(begun(engine, {"one": 1}))
    np.testing.assert_array_equal(embed(engine, prompt), plain)
    assert tokens_of(begun(engine, {"one": 1})) == expected


def test_an_adapter_that_is_not_applied_is_refused_with_those_that_are(engine: Engine) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"'one'.*none is applied"):
        begun(engine, {"one": 1})
    engine.set_adapters(BOTH)
    with pytest.raises(AdapterNotFoundError, match=r"'three'.*'one', 'two'"):
        begun(engine, {"one": 1, "three": 1})
    waiting = engine.decoding(engine.tokenizer.encode(PROMPT), adapters={"one": 1})
    engine.set_adapters({})
    with pytest.raises(AdapterNotFoundError):
        engine.begin(waiting)
    assert engine.places.n_free == 3


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 11.0, -10.5, True, "1"])
def test_what_is_no_strength_is_refused(engine: Engine, strength: float) -> None:
    engine.set_adapters(BOTH)
    with pytest.raises(RequestError, match="-10 to 10"):
        begun(engine, {"one": strength})


def test_an_adapter_that_does_not_fit_changes_nothing(engine: Engine, path: Path) -> None:
    engine.set_adapters({"one": ONE})
    wrong = change("blk.9.ffn_down.weight", N_FF, N_EMBD, 1, 1)
    with pytest.raises(RequestError, match="adapter 'two'"):
        engine.set_adapters({"one": OTHER_ONE, "two": [wrong]})
    assert tokens_of(begun(engine, None)) == fresh(path, BOTH, {"one": 1})


def test_versions_tell_changes_apart() -> None:
    one = ONE[0]
    others = [
        [LowRank(one.matrix, one.a, one.b, 0.25)],
        [LowRank("blk.1.ffn_down.weight", one.a, one.b, 0.5)],
        [LowRank(one.matrix, one.a * 2, one.b, 0.5)],
        [LowRank(one.matrix, one.a, one.b * 2, 0.5)],
        [],
        [one, one],
        TWO,
        TWO[::-1],
    ]
    assert len({version_of(changes) for changes in [ONE, *others]}) == 9
    assert version_of(ONE) == version_of([LowRank(one.matrix, one.a.astype(np.float64), one.b, 0.5)])
