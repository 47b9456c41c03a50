"""The daemon answers with what its store of adapters says is applied, and with what a request asks for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from demo_adapters import COUNT, GREEDY, PROMPT, WISHES, Strengths, changes, expected, identity, keep

from edge_runtime.daemon.adapters import STORE_NAME
from edge_runtime.daemon.config import Config, ModelConfig, SchedulingConfig
from edge_runtime.daemon.requests import GenerationRequest
from edge_runtime.daemon.service import Service
from edge_runtime.engine.adapters import LowRank
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import AdapterNotFoundError, ConfigError, RequestError
from edge_runtime.model_store.store import ModelStore
from edge_runtime.personalize.store import AdapterStore

# Nearly every token alike: an answer goes on until its limit.
RAMBLING = SamplingParameters(temperature=50, top_k=0, top_p=1, min_p=0, seed=1)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / STORE_NAME)


def serve(home: Path, use: Callable[[Service], Awaitable[None]], sequences: int = 2) -> None:
    async def run() -> None:
        config = Config(
            model=ModelConfig(threads=1, sequences=sequences, context=256), scheduling=SchedulingConfig()
        )
        service = Service(config, store=ModelStore(home))
        await service.start()
        try:
            await use(service)
        finally:
            await service.stop(0.0)

    asyncio.run(run())


async def text(service: Service, wish: Strengths | None = None, **settings: object) -> str:
    """An answer; a wish of None leaves the choice to the daemon."""
    adapters = None if wish is None else tuple(wish.items())
    asked = GenerationRequest(
        prompt=PROMPT,
        **{"sampling": GREEDY, "max_tokens": COUNT, "adapters": adapters, **settings},  # type: ignore[arg-type]
    )
    async with await service.generate(asked) as answer:
        return "".join([chunk.text async for chunk in answer])


def test_what_is_applied_when_a_model_is_loaded_is_in_force(tmp_path: Path, store: AdapterStore) -> None:
    keep(store, "one", "three")
    store.import_adapter("of-another", "other", "0" * 64, changes()["three"], {})

    async def use(service: Service) -> None:
        assert await text(service) == expected({"one": 1.0, "three": 1.0})
        assert [row["name"] for row in service.status().adapters] == ["one", "three"]

    serve(tmp_path, use)


def test_a_request_chooses_among_what_is_applied(tmp_path: Path, store: AdapterStore) -> None:
    keep(store, "one", "two", "three")

    async def use(service: Service) -> None:
        wishes = WISHES * 2
        found = await asyncio.gather(*(text(service, wish) for wish in wishes))
        assert found == [expected(wish) for wish in wishes]
        with pytest.raises(AdapterNotFoundError, match=r"'four'.*'one', 'two', 'three'"):
            await text(service, {"four": 1.0})

    serve(tmp_path, use, sequences=4)


def test_what_another_process_applies_counts_from_the_next_request_on(
    tmp_path: Path, store: AdapterStore
) -> None:
    async def use(service: Service) -> None:
        assert await text(service) == expected({})
        assert not store.path.exists()
        keep(store, "one")
        assert await text(service) == expected({"one": 1.0})
        keep(store, "three")
        assert await text(service) == expected({"one": 1.0, "three": 1.0})
        store.revert(store.get("one").id, {})
        assert await text(service) == expected({"three": 1.0})
        store.revert(store.get("three").id, {})
        assert await text(service) == expected({})
        assert service.status().adapters == ()

    serve(tmp_path, use)


def test_an_unchanged_store_is_not_opened_for_each_request(
    tmp_path: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(store, "one")
    for path in tmp_path.glob(f"{STORE_NAME}*"):  # as if nobody had written lately
        os.utime(path, (1e9, 1e9))

    async def use(service: Service) -> None:
        await text(service)
        monkeypatch.delattr(AdapterStore, "revision")
        await text(service)

    serve(tmp_path, use)


def test_an_answer_in_progress_ends_as_it_began_though_all_places_are_busy(
    tmp_path: Path, store: AdapterStore
) -> None:
    keep(store, "one")

    async def use(service: Service) -> None:
        running = await service.generate(GenerationRequest(prompt=PROMPT, sampling=GREEDY, max_tokens=COUNT))
        found = (await anext(running)).text
        store.revert(store.get("one").id, {})
        keep(store, "two")
        await service.refresh_adapters()
        found += "".join([chunk.text async for chunk in running])
        assert found == expected({"one": 1.0})
        assert await text(service) == expected({"two": 1.0})

    serve(tmp_path, use, sequences=1)


def test_a_request_whose_adapter_is_undone_while_it_waits_is_told_so(
    tmp_path: Path, store: AdapterStore
) -> None:
    keep(store, "one")

    async def use(service: Service) -> None:
        running = await service.generate(GenerationRequest(prompt=PROMPT, sampling=RAMBLING))
        await anext(running)
        waiting = [
            await service.generate(
                GenerationRequest(prompt=PROMPT, sampling=GREEDY, max_tokens=COUNT, adapters=adapters)
            )
            for adapters in ((("one", 1.0),), ())
        ]
        store.revert(store.get("one").id, {})
        await service.refresh_adapters()
        running.cancel()
        with pytest.raises(AdapterNotFoundError):
            await anext(waiting[0])
        assert "".join([chunk.text async for chunk in waiting[1]]) == expected({})
        assert service.status().finished["adapter_not_found"] == 1

    serve(tmp_path, use, sequences=1)


def test_an_adapter_that_does_not_fit_is_no_reason_to_answer_without_it(
    tmp_path: Path, store: AdapterStore
) -> None:
    wrong = LowRank("blk.0.ffn_down.weight", np.ones((1, 3), np.float32), np.ones((3, 1), np.float32))

    async def use(service: Service) -> None:
        assert await text(service) == expected({})
        record = store.import_adapter("wrong", "demo", identity(), [wrong], {})
        for _ in range(2):
            with pytest.raises(ConfigError, match="edgert edits revert wrong"):
                await text(service)
        store.revert(record.id, {})
        assert await text(service) == expected({})

    serve(tmp_path, use)


def test_a_damaged_store_stops_the_daemon_from_starting(tmp_path: Path, store: AdapterStore) -> None:
    store.path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match="adapters"):
        serve(tmp_path, lambda service: asyncio.sleep(0))


@pytest.mark.parametrize(
    "adapters", [(("one", float("nan")),), (("one", 99.0),), (("one", 1.0), ("one", 2.0))]
)
def test_what_no_request_can_ask_for_is_refused(adapters: tuple[tuple[str, float], ...]) -> None:
    with pytest.raises(RequestError):
        GenerationRequest(prompt=PROMPT, adapters=adapters)
