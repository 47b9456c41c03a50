"""Adapters where several nodes compute: the tokens are those of one device with the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import demo_adapters
import numpy as np
import pytest
from cluster_fixture import FLOATS, Spread, greedy, plan_of, spread, write_model

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.prepared_adapters import PreparedAdapters
from edge_runtime.engine.adapters import Adapters, LowRank
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.errors import RequestError
from models.synthetic import SyntheticModel

PROMPTS = ([1, 300, 301, 302], [1, 400, 7], [1, 9, 8, 7, 6], [1, 77])
TOKENS = 48
Wish = Mapping[str, float]  # of one sequence: adapter -> strength
Forward = Callable[[Batch], Result]


def change(matrix: str, n_in: int, n_out: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, n_in)), random.standard_normal((n_out, rank))
    return LowRank(matrix, a.astype(np.float32), b.astype(np.float32), scale / np.sqrt(n_in * rank))


def adapters_of(model: SyntheticModel) -> dict[str, list[LowRank]]:
    """An edit of one layer; one of several matrices of several layers, attention and head among them."""
    embd, ff = model.n_embd, model.n_ff
    return {
        "edit": [change("blk.1.ffn_down.weight", ff, embd, 1, 1)],
        "lora": [
            change("blk.0.ffn_gate.weight", embd, ff, 2, 2),
            change("blk.2.ffn_up.weight", embd, ff, 3, 3),
            change("blk.2.ffn_down.weight", ff, embd, 2, 4),
            change("blk.1.attn_q.weight", embd, embd, 2, 5),
            change("blk.3.attn_output.weight", embd, embd, 1, 6),
            change("output.weight", embd, model.n_vocab, 2, 7, 0.3),
        ],
    }


ADAPTERS = adapters_of(FLOATS)
EVERYTHING: Wish = {"edit": 1.0, "lora": 0.7}


def with_wishes(forward: Forward, wishes: Sequence[Wish]) -> Forward:
    """Computes each sequence's rows under its own wish."""

    def wished(batch: Batch) -> Result:
        sequences = np.broadcast_to(np.asarray(batch.sequences), (len(batch.positions),))
        names = {name for wish in wishes for name in wish}
        strengths = {
            name: np.array([wishes[number].get(name, 0.0) for number in sequences], np.float32)
            for name in names
        }
        return forward(replace(batch, adapters=strengths))

    return wished


def alone(
    path: Path,
    adapters: Adapters,
    wishes: Sequence[Wish],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    count: int = TOKENS,
    kv_type: Any = "f32",
    least_gap: float = 1e-4,
) -> list[list[int]]:
    """What one device continues the prompts with, each under its wish, by choices that are clear."""
    found, gaps = [], []

    def forward(engine: Engine, batch: Batch) -> Result:
        result = engine.model.forward(batch)
        top = np.partition(result.logits, -2, axis=1)[:, -2:]
        gaps.append(float((top[:, 1] - top[:, 0]).min()))
        return result

    with Engine.load(path, EngineOptions(threads=1, context=512, kv_type=kv_type)) as engine:
        engine.model.set_adapters(adapters)
        for prompt, wish in zip(prompts, wishes, strict=False):
            found += greedy(engine.model, with_wishes(partial(forward, engine), [wish]), [prompt], count)
    assert min(gaps) > least_gap, f"two tokens were only {min(gaps)} apart: take other prompts"
    return found


def spread_greedy(
    made: Spread, wishes: Sequence[Wish], prompts: Sequence[Sequence[int]] = PROMPTS, count: int = TOKENS
) -> list[list[int]]:
    some = prompts[: len(wishes)]
    return greedy(made.model, with_wishes(made.forward, wishes), some, count)


def assert_all_trusted(made: Spread) -> None:
    """No worker's contribution was found to be wrong."""
    assert made.coordinator is not None
    assert not any(health.expelled for health in made.coordinator.health)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("floats"))


@pytest.fixture(scope="module", params=["udp", "grpc"])
def made(request: pytest.FixtureRequest, floats: Path) -> Iterator[Spread]:
    with spread(floats, sequences=4, transport=request.param) as spreading:
        yield spreading


@pytest.fixture(scope="module")
def expected(floats: Path) -> list[int]:
    """Of the first prompt under `EVERYTHING`; unlike the plain model's."""
    (found,) = alone(floats, ADAPTERS, [EVERYTHING])
    (plain,) = alone(floats, {}, [{}])
    assert found != plain
    return found


# --- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "head"),
    [((1,), ()), ((1, 1), (1, 2)), ((1, 1, 1), (1, 1, 1)), ((0, 1, 2), (0, 1, 2)), ((3, 0, 1), (3, 0, 0))],
)
def test_exact_gives_the_tokens_of_one_device_with_the_same_adapters(
    made: Spread, expected: list[int], parts: Sequence[float], head: Sequence[int]
) -> None:
    made.use(plan_of(made.shape, parts, head=head))
    made.apply(ADAPTERS)
    for node in made.nodes:
        node.versions.clear()
    assert spread_greedy(made, [EVERYTHING]) == [expected]
    for node, part in zip(made.nodes, parts[1:], strict=False):
        assert bool(part) == any(node.versions)
    assert_all_trusted(made)


@pytest.mark.parametrize("parts", [(1, 1), (1, 1, 1)])
def test_a_quantized_model_gives_the_tokens_of_one_device(demo_model: Path, parts: Sequence[float]) -> None:
    adapters, wishes = demo_adapters.changes(), [wish for wish in demo_adapters.WISHES if len(wish) < 2]
    with spread(demo_model, sequences=4, kv_type="f16") as spreading:
        prompt = spreading.engine.tokenizer.encode(demo_adapters.PROMPT)
        spreading.use(plan_of(spreading.shape, parts))
        spreading.apply(adapters)
        for wish in wishes:
            expected = alone(demo_model, adapters, [wish], [prompt], 16, "f16", 0.1)
            assert spread_greedy(spreading, [wish], [prompt], 16) == expected
        assert_all_trusted(spreading)


def test_quantized_inputs_do_not_touch_what_adapters_multiply(tmp_path: Path) -> None:
    """What a worker's gate multiplies travels with 8 bits; its side path must not be computed from that."""
    model = replace(FLOATS, quantization="Q8_0", n_ff=384)
    path = write_model(tmp_path, model)
    strong = {"lora": [change("blk.2.ffn_gate.weight", 128, 384, 2, 2, 40.0)]}
    batch = Batch([5, 6, 7], [0, 1, 2], adapters={"lora": 1.0})
    with Engine.load(path, EngineOptions(threads=1, context=64, kv_type="f32")) as engine:
        engine.model.set_adapters(strong)
        wanted = engine.model.forward(batch).logits
    with spread(path, context=64) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 3)), prefill=False)
        spreading.apply(strong)
        found = spreading.forward(batch).logits
    # Sums in another order tip a rounding to 8 bits now and then.
    assert np.abs(found - wanted).max() < 0.02 * wanted.std()


def test_a_prompt_goes_on_without_a_worker_that_lost_the_version(made: Spread, floats: Path) -> None:
    prompt = np.random.default_rng(60).integers(3, FLOATS.n_vocab, 60)
    batch = Batch(prompt.astype(np.int32), np.arange(60, dtype=np.int32), adapters=EVERYTHING)
    with Engine.load(floats, EngineOptions(threads=1, context=64, kv_type="f32")) as engine:
        engine.model.set_adapters(ADAPTERS)
        expected = engine.model.forward(batch).logits
    made.use(plan_of(made.shape, (1, 1, 1)))
    made.apply(ADAPTERS)
    for version in (900, 901):  # with the third, the first is gone
        made.node(1).held.load_adapters(1, version, {})
    made.model.cells.remove(0)
    found = made.forward(batch).logits
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    assert_all_trusted(made)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("length", [8, 60])
def test_prompts_are_computed_with_adapters_together_and_alone(
    made: Spread, floats: Path, length: int, prefill: bool
) -> None:
    prompt = np.random.default_rng(length).integers(3, FLOATS.n_vocab, length).tolist()
    expected = alone(floats, ADAPTERS, [EVERYTHING], [prompt], 8)
    made.use(plan_of(made.shape, (1, 2, 1), head=(0, 1, 2)), prefill=prefill)
    made.apply(ADAPTERS)
    for _ in range(3):
        assert spread_greedy(made, [EVERYTHING], [prompt], 8) == expected
    assert_all_trusted(made)


def test_rows_of_one_batch_have_their_own_adapters(made: Spread, floats: Path) -> None:
    wishes: list[Wish] = [{}, {"edit": 1.0}, {"lora": 0.7}, {"edit": -0.5, "lora": 0.3}]
    expected = alone(floats, ADAPTERS, wishes)
    assert expected != alone(floats, {}, [{}] * 4)
    made.use(plan_of(made.shape, (1, 1, 1), head=(1, 1, 1)))
    made.apply(ADAPTERS)
    assert spread_greedy(made, wishes) == expected
    assert_all_trusted(made)


def test_without_adapters_in_use_requests_are_the_plain_ones(made: Spread, floats: Path) -> None:
    made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    made.apply(ADAPTERS)
    node = made.node(1)
    node.versions.clear()
    assert spread_greedy(made, [{}]) == alone(floats, {}, [{}])
    assert node.versions and not any(node.versions)
    node.versions.clear()
    assert spread_greedy(made, [{"edit": 0.0}], count=4) == alone(floats, {}, [{}], count=4)
    assert not any(node.versions)


def test_layers_that_no_adapter_in_use_changes_get_plain_requests(made: Spread) -> None:
    made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    prepared = made.apply(ADAPTERS)
    node = made.node(1)
    node.versions.clear(), node.computed.clear()
    spread_greedy(made, [{"edit": 1.0}], count=4)
    by_layer = {(layer, version) for (_, layer, _), version in zip(node.computed, node.versions, strict=True)}
    assert by_layer == {(0, 0), (1, prepared.version), (2, 0), (3, 0), (4, 0)}


# --- changes of version and of plan -----------------------------------------------------------


def test_switching_in_mid_generation_mixes_nothing(made: Spread, floats: Path) -> None:
    """One device that changes between the same tokens gives the same tokens."""
    other = adapters_of(replace(FLOATS, n_layers=4))
    other["edit"] = [change("blk.1.ffn_down.weight", FLOATS.n_ff, FLOATS.n_embd, 2, 11)]
    sets: list[tuple[Adapters, Wish]] = [
        ({}, {}),
        (ADAPTERS, {"edit": 1.0}),
        (other, {"edit": 1.0}),
        (other, {}),
        (ADAPTERS, {"edit": 0.5, "lora": 0.7}),
        ({}, {}),
    ]

    def changing(forward: Forward, apply: Callable[[Adapters], object]) -> Forward:
        tokens = 0

        def changed(batch: Batch) -> Result:
            nonlocal tokens
            adapters, wish = sets[tokens // 9 % len(sets)]
            if tokens % 9 == 0:
                apply(adapters)
            tokens += 1
            return with_wishes(forward, [wish])(batch)

        return changed

    with Engine.load(floats, EngineOptions(threads=1, context=512, kv_type="f32")) as engine:
        model = engine.model
        expected = greedy(model, changing(model.forward, model.set_adapters), PROMPTS[:1], 60)
    made.use(plan_of(made.shape, (1, 1, 1), head=(1, 1, 1)))
    made.node(1).versions.clear()
    assert greedy(made.model, changing(made.forward, made.apply), PROMPTS[:1], 60) == expected
    used = [version for version in made.node(1).versions if version]
    assert used == sorted(used) and len(set(used)) == 3


def test_plans_change_under_the_same_adapters(made: Spread, expected: list[int]) -> None:
    plans = [
        plan_of(made.shape, parts, head=head, number=number, replicas=number % 2 == 0, seed=number)
        for number, (parts, head) in enumerate(
            [((1, 1), ()), ((1, 1, 1), (1, 1, 1)), ((0, 1, 3), (0, 3, 0)), ((1,), ())], start=70_000
        )
    ]
    tokens = 0

    def forward(batch: Batch) -> Result:
        nonlocal tokens
        if tokens % 7 == 0:
            made.use(plans[tokens // 7 % len(plans)])
            made.apply(ADAPTERS)
        tokens += 1
        return made.forward(batch)

    assert greedy(made.model, with_wishes(forward, [EVERYTHING]), PROMPTS[:1], TOKENS) == [expected]


# --- workers that lack them, or do them wrong ---------------------------------------------------


def test_a_worker_that_lacks_the_version_is_used_for_plain_tokens_alone(
    made: Spread, floats: Path, expected: list[int]
) -> None:
    made.use(plan_of(made.shape, (1, 1, 1), head=(1, 1, 1)))
    made.apply(ADAPTERS, ready=[2])
    made.node(1).computed.clear(), made.node(2).computed.clear()
    assert spread_greedy(made, [EVERYTHING]) == [expected]
    assert not made.node(1).computed and made.node(2).computed
    assert spread_greedy(made, [{}]) == alone(floats, {}, [{}])
    assert made.node(1).computed


def test_a_worker_that_has_lost_the_version_is_done_without(
    made: Spread, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    made.apply(ADAPTERS)
    held = made.node(1).held
    held.load_adapters(1, 900, {})
    held.load_adapters(1, 901, {})  # the third: the first is gone
    request = Contributions()
    assert greedy(
        made.model, with_wishes(lambda b: made.forward(b, [request]), [EVERYTHING]), PROMPTS[:1], TOKENS
    ) == [expected]
    assert "refuses: adapters" in caplog.text
    assert request.recomputed > 0


def test_a_wrong_side_path_is_found_out_at_its_first_use(
    made: Spread, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made.use(plan_of(made.shape, (1, 1), head=(1, 2)))
    made.apply(ADAPTERS)
    spread_greedy(made, [{}], count=3)  # the plain answers are verified by now
    wrong = {"edit": [replace_b(ADAPTERS["edit"][0], 3.0)], "lora": ADAPTERS["lora"]}
    prepared = made.apply(ADAPTERS)
    assert made.coordinator is not None
    lie = PreparedAdapters(wrong, prepared.version, made.shape, made.coordinator.plan_shares, made.computer)
    made.node(1).prepare_adapters(lie, 1)
    assert spread_greedy(made, [EVERYTHING]) == [expected]
    assert "differs by" in caplog.text
    lie.close()


def replace_b(of: LowRank, factor: float) -> LowRank:
    return LowRank(of.matrix, of.a, of.b * np.float32(factor), of.scale)


def test_adapters_that_were_not_prepared_are_refused(made: Spread) -> None:
    made.use(plan_of(made.shape, (1, 1)))
    made.model.set_adapters(ADAPTERS)  # the model alone: an engine that is spread must not be told like this
    with pytest.raises(RequestError, match="1 adapters are asked for, and 0 are prepared"):
        made.forward(Batch([5], [0], adapters={"edit": 1.0}))
    made.model.cells.remove(0)
