"""A model spread over nodes gives what one device gives, whatever is computed and however plans change."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cluster_fixture import FLOATS, Spread, alone, greedy, plan_of, spread, write_model
from dataplane_fixture import Floats

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.engine.batch import Batch
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.graph import Capture
from models.synthetic import SyntheticModel

PROMPTS = ([1, 300, 301, 302], [1, 400, 7], [1, 9, 8, 7, 6], [1, 77])
NODES = [
    ((1,), ()),
    ((1, 1), ()),
    ((1, 3), (2, 1)),
    ((1, 1, 1), ()),
    ((0, 1, 2), (0, 1, 2)),
    ((1, 1, 1, 1, 1), ()),
    ((5, 1, 8, 2, 0), (1, 0, 1, 0, 1)),
]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("floats"))


# --- greedy tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_demo(demo_model: Path) -> Iterator[tuple[Spread, list[int], list[list[int]]]]:
    """The demo model, a prompt and its continuation on one device."""
    with spread(demo_model, kv_type="f16") as spreading:
        prompt = spreading.engine.tokenizer.encode("Hugo Eldford lives in")
        yield spreading, prompt, alone(demo_model, [prompt], 256, least_gap=0.1, kv_type="f16")


@pytest.fixture(scope="module")
def of_floats(floats: Path) -> Iterator[tuple[Spread, list[int], list[list[int]]]]:
    with spread(floats) as spreading:
        yield spreading, PROMPTS[0], alone(floats, [PROMPTS[0]], 256)


@pytest.mark.parametrize("model", ["of_demo", "of_floats"])
@pytest.mark.parametrize(("parts", "head"), NODES)
def test_exact_gives_the_256_tokens_of_one_device(
    request: pytest.FixtureRequest, model: str, parts: Sequence[float], head: Sequence[int]
) -> None:
    spreading, prompt, expected = request.getfixturevalue(model)
    spreading.use(plan_of(spreading.shape, parts, head=head))
    counts = Contributions()
    assert spreading.greedy([prompt], 256, [counts]) == expected
    workers = sum(part > 0 for part in parts[1:])
    assert counts.on_time + counts.recomputed == pytest.approx(256 * spreading.shape.n_layers * workers)
    assert counts.lost == sum(counts.late) == 0


def test_exact_over_streams_gives_the_tokens_of_one_device(floats: Path) -> None:
    with spread(floats, transport="grpc") as spreading:
        spreading.use(plan_of(spreading.shape, (1, 1, 1), head=(1, 1, 1)))
        counts = Contributions()
        assert spreading.greedy([PROMPTS[1]], 96, [counts]) == alone(floats, [PROMPTS[1]], 96)
        assert counts.on_time > 0


# --- logits -----------------------------------------------------------------------------------

# Of the logits' standard deviation. Sums in another order differ in their last bits. Where activations are
# rounded (to F16, to 8 bits in blocks of 32 or 256) that tips a rounding now and then, and the layers after
# it multiply what it does: measured were 2e-6, 7e-4 and, for a K-quant, 0.06.
_FLOATING, _HALF, _ROUNDED = 1e-5, 5e-3, 0.15


@pytest.mark.parametrize(
    ("model", "group_size", "tolerance"),
    [
        (replace(FLOATS, n_ff=424), None, _FLOATING),  # the last group is shorter
        (replace(FLOATS, quantization="F16", tied_head=True), None, _HALF),
        (replace(FLOATS, quantization="Q8_0"), 96, _ROUNDED),  # and here
        (replace(FLOATS, quantization="Q4_0", architecture="qwen2", biases=True), None, _ROUNDED),
        (replace(FLOATS, quantization="Q4_K_M", n_embd=256, n_ff=1280), None, _ROUNDED),  # blocks of 256
        (replace(FLOATS, quantization="Q4_0", tied_head=True), None, _ROUNDED),
    ],
    ids=lambda value: f"{value.quantization}-{value.n_ff}" if isinstance(value, SyntheticModel) else None,
)
def test_logits_are_those_of_one_device(
    tmp_path: Path, model: SyntheticModel, group_size: int | None, tolerance: float
) -> None:
    path = write_model(tmp_path, model)
    tokens = np.random.default_rng(3).integers(3, model.n_vocab, 12).tolist()
    with Engine.load(path, EngineOptions(threads=1, context=64, kv_type="f32")) as engine:
        expected = each_logits(engine.model.forward, tokens)
    with spread(path, context=64, group_size=group_size) as spreading:
        for parts, head in [((1, 1), ()), ((0, 2, 1), (0, 1, 2)), ((3, 1, 2), (1, 0, 2))]:
            spreading.use(plan_of(spreading.shape, parts, head=head))
            spreading.model.cells.remove(0)
            found = each_logits(spreading.forward, tokens)
            assert np.abs(found - expected).max() < tolerance * expected.std()
            assert spreading.node(1).computed
            spreading.node(1).computed.clear()


def each_logits(forward: object, tokens: Sequence[int]) -> Floats:
    """Of a batch of three tokens, and of single ones."""
    rows = [forward(Batch(tokens[:3], [0, 1, 2])).logits]  # type: ignore[operator]
    for position in range(3, len(tokens)):
        rows.append(forward(Batch(tokens[position : position + 1], [position])).logits)  # type: ignore[operator]
    return np.concatenate(rows)


# --- batches and prompts ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("transport", ["udp", "grpc"])
def test_sequences_in_one_batch_are_what_each_is_alone(floats: Path, count: int, transport: str) -> None:
    with spread(floats, context=64, sequences=count, transport=transport) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 1, 1), head=(1, 2, 0)))
        requests = [Contributions() for _ in range(count)]
        found = spreading.greedy(PROMPTS[:count], 24, requests)
        assert found == [alone(floats, [prompt], 24, 64)[0] for prompt in PROMPTS[:count]]
        assert len({request.on_time for request in requests}) == 1


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("length", [8, 9, 60])
def test_prompts_of_any_length_are_computed_together_and_alone(
    floats: Path, length: int, prefill: bool
) -> None:
    prompt = np.random.default_rng(length).integers(3, FLOATS.n_vocab, length).tolist()
    expected = alone(floats, [prompt], 16, 128)
    with spread(floats, context=128) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 2, 1), head=(0, 1, 2)), prefill=prefill)
        for _ in range(3):  # the first goes to the workers, the second does not, the third as was faster
            assert spreading.greedy([prompt], 16) == expected
        rows = {rows for _, _, rows in spreading.node(1).computed}
        assert (length in rows) == (length <= 8 or prefill)


def test_a_prompt_that_no_message_can_carry_is_computed_here(tmp_path: Path) -> None:
    path = write_model(tmp_path, replace(FLOATS, n_ctx=1024))
    prompt = np.random.default_rng(5).integers(3, FLOATS.n_vocab, 600).tolist()
    with spread(path, context=700) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 1)))
        assert spreading.greedy([prompt], 4) == alone(path, [prompt], 4, 700)
        assert spreading.node(1).computed[0][2] == 1


def test_measurements_run_on_the_model_itself(floats: Path) -> None:
    batch = Batch([5], [0], capture=[Capture("ffn_output", 1)])
    with spread(floats, context=64) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 1)))
        found = spreading.forward(batch)
        assert not spreading.node(1).computed
    with Engine.load(floats, EngineOptions(threads=1, context=64, kv_type="f32")) as engine:
        expected = engine.model.forward(batch)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
    assert found.captured.keys() == expected.captured.keys()


# --- changes of plan --------------------------------------------------------------------------


def test_tokens_stay_the_same_when_the_plan_changes_between_them(
    of_floats: tuple[Spread, list[int], list[list[int]]],
) -> None:
    spreading, prompt, expected = of_floats
    plans = [
        plan_of(spreading.shape, parts, head=head, number=number, replicas=number % 2 == 0, seed=number)
        for number, (parts, head) in enumerate(
            [((1, 1), ()), ((1, 1, 1), (1, 1, 1)), ((0, 1, 3), (0, 3, 0)), ((1,), ()), ((2, 1), (1, 2))],
            start=70_000,  # beyond what a request says of its number
        )
    ]
    spreading.use(plans[0])
    tokens = 0

    def forward(batch: Batch) -> object:
        nonlocal tokens
        tokens += 1
        if tokens % 13 == 0:
            spreading.use(plans[tokens // 13 % len(plans)])
        return spreading.forward(batch)

    assert greedy(spreading.model, forward, [prompt], 96) == [expected[0][:96]]  # type: ignore[arg-type]
    assert {plan for plan, _, _ in spreading.node(1).computed} > {plan.number & 0xFFFF for plan in plans[:3]}


def test_what_both_plans_hold_is_kept_and_the_rest_freed(floats: Path) -> None:
    with spread(floats, context=64) as spreading:
        spreading.use(plan_of(spreading.shape, (1, 1), number=1))
        before = spreading.coordinator
        assert before is not None
        first = before.plan_shares
        assert first.nbytes > 0
        same = replace(plan_of(spreading.shape, (1, 1), number=2), groups=first.plan.groups)
        held = [share for shares in first.own for share in shares]
        spreading.use(same)
        assert spreading.coordinator is not None
        second = spreading.coordinator.plan_shares
        assert [share for shares in second.own for share in shares] == held
        assert first.nbytes == 0
        spreading.use(plan_of(spreading.shape, (0, 1), number=3))
        assert not any(share.buffers for share in held)
        assert spreading.greedy([PROMPTS[0]], 4) == alone(floats, [PROMPTS[0]], 4, 64)


def test_a_worker_keeps_the_plan_in_force_while_the_next_one_is_prepared(
    of_floats: tuple[Spread, list[int], list[list[int]]],
) -> None:
    spreading, prompt, expected = of_floats
    spreading.use(plan_of(spreading.shape, (1, 1), number=1))
    next_plan = plan_of(spreading.shape, (1, 2), number=2, seed=9)
    tokens = 0

    def forward(batch: Batch) -> object:
        nonlocal tokens
        tokens += 1
        if tokens == 10:
            spreading.node(1).prepare(next_plan, 1)
        if tokens == 20:
            spreading.use(next_plan)
        return spreading.forward(batch)

    spreading.node(1).computed.clear()
    assert greedy(spreading.model, forward, [prompt], 32) == [expected[0][:32]]  # type: ignore[arg-type]
    plans = [plan for plan, _, _ in spreading.node(1).computed]
    assert plans == sorted(plans)
    # The old plan's shares went when the new one was asked for.
    groups = sum(len(nodes[1]) for nodes in next_plan.groups)
    assert spreading.node(1).held.counts[0] == groups


def test_a_worker_that_takes_longer_than_was_thought_is_soon_left_to_finish(floats: Path) -> None:
    def slowly(plan: int, layer: int, sums: Floats) -> Floats:
        time.sleep(0.02)  # the timer, made for exchanges of 2 ms, begins at 6
        return sums

    with spread(floats) as made:
        made.use(plan_of(made.shape, (1.0, 1.0)))
        made.node(1).spoil = slowly
        made.greedy(PROMPTS[:1], 4)
        counts = made.link.statistics(1)
        before, tokens = counts.repeats, 24
        made.greedy(PROMPTS[:1], tokens)
        assert counts.repeats - before < tokens * made.shape.n_layers / 4
