"""Whatever workers and the network do, an exact generation goes on and gives what one device gives."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cluster_fixture import Spoil, Spread, alone, greedy, plan_of, spread, write_model
from dataplane_fixture import PATIENCE, Floats, Relay

from edge_runtime.cluster import worker_health
from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.exchange import RefusalReason, RefusedError
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.cluster.worker_session import Request, WorkerSession
from edge_runtime.engine.batch import Batch, Result

PROMPT = [1, 300, 301, 302]
TOKENS = 48
THIRDS = (1.0, 1.0, 1.0)
HEAD = (1, 1, 1)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("floats"))


@pytest.fixture(scope="module")
def expected(floats: Path) -> list[int]:
    """What one device continues with; any error makes it something else."""
    return alone(floats, [PROMPT], 160)[0]


@pytest.fixture(scope="module", params=["udp", "grpc"])
def either(request: pytest.FixtureRequest, floats: Path) -> Iterator[Spread]:
    with spread(floats, transport=request.param) as spreading:
        yield spreading


@pytest.fixture(scope="module")
def datagrams(floats: Path) -> Iterator[Spread]:
    with spread(floats) as spreading:
        yield spreading


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_health, "_FIRST_PAUSE", 0.05)


@pytest.fixture(autouse=True, scope="module")
def _short_collections() -> Iterator[None]:
    """The daemon does so too: collecting what stays takes 50 ms, for which a worker would be given up."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def spoilt(made: Spread, spoil: Spoil | None, worker: int = 1) -> Iterator[None]:
    node = made.node(worker)
    node.computed.clear()
    node.spoil = spoil
    try:
        yield
    finally:
        node.spoil = None


def generate(made: Spread, expected: list[int], count: int = TOKENS) -> Contributions:
    """Generate, with the tokens of one device and every contribution accounted for."""
    request = Contributions()
    assert made.greedy([PROMPT], count, [request]) == [expected[:count]]
    assert account(request) == pytest.approx(count * made.shape.n_layers * 2)
    return request


def account(request: Contributions) -> float:
    return request.on_time + sum(request.late) + request.lost + request.recomputed


def expelled(made: Spread, worker: int = 1) -> str:
    assert made.coordinator is not None
    return made.coordinator.health[worker].expelled


def failures(made: Spread, worker: int = 1) -> int:
    assert made.coordinator is not None
    return made.coordinator.health[worker].failures


def refusing(reason: RefusalReason) -> Spoil:
    def refuse(plan: int, layer: int, sums: Floats) -> Floats:
        raise RefusedError(reason)

    return refuse


def failing(plan: int, layer: int, sums: Floats) -> Floats:
    raise ValueError("a fault in computing")


def factor(by: float, only: Callable[[int], bool] = lambda layer: True) -> Spoil:
    return lambda plan, layer, sums: sums * np.float32(by) if only(layer) else sums


# --- wrong answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan, layer, sums: np.full_like(sums, np.nan),
        lambda plan, layer, sums: np.where(np.arange(sums.size) == 77, np.inf, sums).astype(np.float32),
        lambda plan, layer, sums: sums[:, :-32].copy(),
        lambda plan, layer, sums: np.concatenate([sums, sums]),
        lambda plan, layer, sums: sums.astype(np.float64),
        failing,
        *(refusing(reason) for reason in RefusalReason),
    ],
    ids=["nan", "inf", "narrow", "twice", "doubles", "fault", *(f"refuses-{r.name}" for r in RefusalReason)],
)
def test_a_worker_without_sound_answers_is_soon_done_without(
    either: Spread, expected: list[int], spoil: Spoil
) -> None:
    with spoilt(either, spoil):
        either.use(plan_of(either.shape, THIRDS, head=HEAD))
        request = generate(either, expected)
        assert request.recomputed == pytest.approx(TOKENS * either.shape.n_layers)
    # Who answers everything with "forgotten" costs nothing but the asking, now and then twice.
    forgets = len(either.node(1).computed) >= TOKENS * (either.shape.n_layers + 1)
    assert forgets or expelled(either) or failures(either)
    assert not expelled(either, 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (factor(1.5), "differs by"),
        (factor(-1.0), "differs by"),
        (factor(1.01), "differs by"),
        (factor(1.5, lambda layer: layer == 4), "layer 4 differs by"),
        (factor(0.0, lambda layer: layer == 3), "layer 3 differs by"),
        (factor(1e9), "no model's"),
    ],
    ids=["more", "negative", "one-percent", "head", "nothing", "huge"],
)
def test_a_worker_that_lies_from_the_start_never_reaches_the_answer(
    either: Spread, expected: list[int], spoil: Spoil, said: str
) -> None:
    with spoilt(either, spoil):
        either.use(plan_of(either.shape, THIRDS, head=HEAD))
        generate(either, expected)
    assert said in expelled(either)
    assert len(either.node(1).computed) <= either.shape.n_layers + 1  # one token


@pytest.mark.parametrize("only", [2, 4], ids=["layer", "head"])
def test_a_lie_that_begins_later_is_found_by_a_spot_check(
    datagrams: Spread, expected: list[int], only: int
) -> None:
    n_checks = 16 * (datagrams.shape.n_layers + 1)
    with spoilt(datagrams, None):
        datagrams.use(plan_of(datagrams.shape, THIRDS, head=HEAD))
        generate(datagrams, expected, 4)
        assert not expelled(datagrams)
        datagrams.node(1).spoil = factor(1.5, lambda layer: layer == only)
        datagrams.greedy([PROMPT], n_checks)
    assert f"layer {only} differs" in expelled(datagrams)
    generate(datagrams, expected)  # and from then on everything is right again


def test_a_worker_that_lies_about_prompts_never_reaches_the_answer(
    either: Spread, expected: list[int]
) -> None:
    prompt = PROMPT + expected[:40]
    for liar in (1, 2):
        with spoilt(either, factor(1.5, lambda layer: layer == 2), liar):
            either.use(plan_of(either.shape, THIRDS))
            assert either.greedy([prompt], 24) == [expected[40:64]]
        assert "of layer 2 to a prompt differs" in expelled(either, liar)
        assert not expelled(either, 3 - liar)


@pytest.mark.parametrize(
    "spoil",
    [failing, refusing(RefusalReason.PLAN), lambda plan, layer, sums: np.full_like(sums, np.nan)],
    ids=["fault", "refuses", "nan"],
)
def test_a_prompt_goes_on_without_a_worker_that_does_not_answer_it(
    either: Spread, expected: list[int], spoil: Spoil
) -> None:
    prompt = PROMPT + expected[:40]
    with spoilt(either, spoil):
        either.use(plan_of(either.shape, THIRDS))
        assert either.greedy([prompt], 8) == [expected[40:48]]
    assert failures(either) and not failures(either, 2)
    assert [rows for _, _, rows in either.node(1).computed].count(len(prompt)) == 1


class OfTheStepBefore(UdpWorker):
    """Answers with the number of the step before."""

    def _answer(self, session: WorkerSession, request: Request) -> list[bytes]:
        request.step -= 1
        return super()._answer(session, request)


def test_a_worker_whose_answers_are_of_old_steps_is_soon_done_without(
    floats: Path, expected: list[int]
) -> None:
    with spread(floats) as made:
        made.node(1, OfTheStepBefore)
        made.use(plan_of(made.shape, THIRDS, head=HEAD))
        request = generate(made, expected)
        assert request.recomputed == pytest.approx(TOKENS * made.shape.n_layers)
        assert made.link.statistics(1).stale > 0
        assert failures(made) >= 1
        assert len(made.node(1).computed) < TOKENS


def test_a_worker_with_another_key_is_soon_done_without(datagrams: Spread, expected: list[int]) -> None:
    with spoilt(datagrams, None):
        datagrams.use(plan_of(datagrams.shape, THIRDS, head=HEAD), secrets={1: os.urandom(32)})
        generate(datagrams, expected)
        assert not datagrams.node(1).computed
    assert failures(datagrams) == 1
    assert datagrams.link.statistics(1).received == 0


# --- workers that go and come -----------------------------------------------------------------


def test_a_worker_that_dies_in_the_middle_of_a_token_is_done_without(
    floats: Path, expected: list[int]
) -> None:
    for transport in ("udp", "grpc"):
        with spread(floats, transport=transport) as made:
            node = made.node(1)

            def die(plan: int, layer: int, sums: Floats, node: object = node) -> Floats:
                if len(node.computed) == 20:  # type: ignore[attr-defined]
                    node.udp.stop()  # type: ignore[attr-defined]
                return sums

            node.spoil = die
            made.use(plan_of(made.shape, THIRDS, head=HEAD))
            request = generate(made, expected)
            assert failures(made) >= 1
            assert 0 < request.recomputed < TOKENS * made.shape.n_layers


def test_a_frozen_worker_is_done_without_and_taken_back_when_it_thaws(
    either: Spread, expected: list[int]
) -> None:
    ice = threading.Event()
    ice.set()

    def freeze(plan: int, layer: int, sums: Floats) -> Floats:
        ice.wait(PATIENCE)
        return sums

    with spoilt(either, freeze):
        either.use(plan_of(either.shape, THIRDS))
        generate(either, expected, 8)
        ice.clear()
        request = generate(either, expected)
        assert failures(either) >= 1
        assert request.recomputed == pytest.approx(TOKENS * either.shape.n_layers)
        ice.set()
        goes_on_until(either, expected, lambda request: request.recomputed == 0)
    assert not expelled(either)


def goes_on_until(made: Spread, expected: list[int], claim: Callable[[Contributions], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not claim(generate(made, expected, 8)):
        assert time.monotonic() < end, "it never came about"


@contextmanager
def relayed(made: Spread, keep: Callable[[bool, int], bool], workers: int = 1) -> Iterator[None]:
    """The first workers behind relays that keep what they are told to."""
    relays = {worker: Relay(made.node(worker).udp.port, keep) for worker in range(1, workers + 1)}
    try:
        ports = {worker: relay.port for worker, relay in relays.items()}
        made.use(plan_of(made.shape, THIRDS, head=HEAD), ports=ports)
        yield
    finally:
        for relay in relays.values():
            relay.close()


@pytest.mark.parametrize("workers", [1, 2], ids=["a worker's link", "the coordinator's link"])
def test_a_link_that_is_down_for_a_while_is_done_without_and_used_again(
    datagrams: Spread, expected: list[int], workers: int
) -> None:
    cut = threading.Event()
    with spoilt(datagrams, None), relayed(datagrams, lambda to_worker, n: not cut.is_set(), workers):
        generate(datagrams, expected, 8)
        cut.set()
        request = generate(datagrams, expected)
        assert request.recomputed == pytest.approx(TOKENS * datagrams.shape.n_layers * workers)
        cut.clear()
        goes_on_until(datagrams, expected, lambda request: request.recomputed == 0)
    assert [failures(datagrams, worker) > 0 for worker in (1, 2)] == [True, workers == 2]


def test_a_link_that_comes_and_goes_changes_no_token(datagrams: Spread, expected: list[int]) -> None:
    with relayed(datagrams, lambda to_worker, n: n // 60 % 2 == 0, workers=2):
        request = generate(datagrams, expected)
        assert request.on_time > 0 and request.recomputed > 0


def test_a_link_that_loses_and_corrupts_changes_no_token(datagrams: Spread, expected: list[int]) -> None:
    random = np.random.default_rng(1)
    with relayed(datagrams, lambda to_worker, n: random.random() > 0.2, workers=2):
        request = generate(datagrams, expected)
        assert request.on_time > TOKENS
        assert datagrams.link.statistics(1).repeats > 0


def test_a_worker_that_forgot_the_session_is_done_without(datagrams: Spread, expected: list[int]) -> None:
    with spoilt(datagrams, None):
        datagrams.use(plan_of(datagrams.shape, THIRDS, head=HEAD))
        generate(datagrams, expected, 8)
        for session in range(1, 1000):
            datagrams.node(1).udp.remove_session(session)
        request = generate(datagrams, expected)
    assert request.recomputed == pytest.approx(TOKENS * datagrams.shape.n_layers)
    assert failures(datagrams) == 1


# --- verification -----------------------------------------------------------------------------


def test_a_worker_is_verified_by_answers_that_came_and_not_by_silence(
    datagrams: Spread, expected: list[int]
) -> None:
    quiet = [True]
    with relayed(datagrams, lambda to_worker, n: not quiet[0]):
        assert datagrams.coordinator is not None
        health = datagrams.coordinator.health
        generate(datagrams, expected, 2)
        assert (health[1].verified, health[2].verified) == (False, True)
        with spoilt(datagrams, factor(1.5)):
            quiet[0] = False
            request = Contributions()
            while not expelled(datagrams):
                assert datagrams.greedy([PROMPT], 8, [request]) == [expected[:8]]


def test_each_plan_verifies_its_workers_anew(datagrams: Spread, expected: list[int]) -> None:
    datagrams.use(plan_of(datagrams.shape, THIRDS, number=1))
    generate(datagrams, expected, 4)
    before = datagrams.coordinator
    assert before is not None and all(health.verified for health in before.health[1:])
    with spoilt(datagrams, factor(1.5)):
        datagrams.use(plan_of(datagrams.shape, THIRDS, number=2), health=before.health)
        generate(datagrams, expected)
    assert "differs" in expelled(datagrams)


def test_a_batch_of_several_sequences_survives_a_worker(floats: Path, expected: list[int]) -> None:
    with spread(floats, sequences=3) as made:
        made.use(plan_of(made.shape, THIRDS, head=HEAD))
        requests = [Contributions() for _ in range(3)]
        step = 0

        def forward(batch: Batch) -> Result:
            nonlocal step
            step += 1
            if step == 6:
                made.node(2).udp.stop()
            return made.forward(batch, requests)

        found = greedy(made.model, forward, [PROMPT] * 3, 24)
        assert found == [expected[:24]] * 3
        assert all(account(request) == account(requests[0]) for request in requests)
