"""The daemon's core with the demo model: many requests at once, each exactly as if it were alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_runtime.daemon.config import Config, ModelConfig, SchedulingConfig
from edge_runtime.daemon.requests import Chunk, GenerationRequest
from edge_runtime.daemon.service import Service
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import (
    ContextOverflowError,
    DeadlineError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from edge_runtime.model_store.store import ModelStore

GREEDY = SamplingParameters(temperature=0)
# Nearly every token alike: an answer goes on until its limit.
RAMBLING = SamplingParameters(temperature=50, top_k=0, top_p=1, min_p=0, seed=1)
PROMPTS = tuple(f"The home of {name} is in" for name in ("Paul Colton", "Ada", "Jana Caldwick", "Nora"))


def serve(
    home: Path,
    use: Callable[[Service], Awaitable[None]],
    scheduling: SchedulingConfig | None = None,
    **model: object,
) -> None:
    async def run() -> None:
        config = Config(
            model=ModelConfig(threads=1, **model),  # type: ignore[arg-type]
            scheduling=scheduling or SchedulingConfig(),
        )
        service = Service(config, store=ModelStore(home))
        await service.start()
        try:
            await use(service)
        finally:
            await service.stop(0.0)

    asyncio.run(run())


def request(prompt: str = PROMPTS[0], **settings: object) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, **{"sampling": GREEDY, **settings})  # type: ignore[arg-type]


async def text(service: Service, asked: GenerationRequest) -> str:
    async with await service.generate(asked) as answer:
        found = "".join([chunk.text async for chunk in answer])
        assert answer.usage is not None
        return found


def test_requests_together_get_the_answers_they_get_alone(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        asked = [request(prompt, max_tokens=24) for prompt in PROMPTS * 3]
        alone = [await text(service, one) for one in asked]
        assert await asyncio.gather(*(text(service, one) for one in asked)) == alone
        assert len(set(alone)) > 1

    serve(tmp_path, use, sequences=4)


def test_a_long_prompt_does_not_stall_running_answers(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        order: list[str] = []

        async def follow(name: str, asked: GenerationRequest) -> None:
            async with await service.generate(asked) as answer:
                async for _ in answer:
                    order.append(name)

        short = asyncio.create_task(follow("short", request(sampling=RAMBLING, max_tokens=60)))
        while not order and not short.done():
            await asyncio.sleep(0.001)
        await follow("long", request("Paul Colton lives in " * 90, max_tokens=1))
        before = order.index("long")
        await short
        # 450 tokens in chunks of 16 are 28 steps, each of which brings the short answer a token.
        assert order[:before].count("short") >= 20

    serve(tmp_path, use, SchedulingConfig(prefill_chunk=16), sequences=2)


def test_a_full_queue_refuses_and_says_when_to_come_again(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        answers = [await service.generate(request(sampling=RAMBLING, max_tokens=200)) for _ in range(2)]
        with pytest.raises(OverloadedError) as refusal:
            for _ in range(2):
                answers.append(await service.generate(request(sampling=RAMBLING, max_tokens=200)))
        assert refusal.value.retry_after >= 1
        for answer in answers:
            answer.cancel()
        assert await text(service, request(max_tokens=2))

    serve(tmp_path, use, SchedulingConfig(queue=1), sequences=1)


def test_cancelling_frees_the_place_within_one_token(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        answer = await service.generate(request(sampling=RAMBLING, max_tokens=400))
        await anext(answer)
        waiting = asyncio.create_task(text(service, request(max_tokens=2)))
        await asyncio.sleep(0)
        answer.cancel()
        at_cancel = service.status().generated_tokens
        await waiting
        assert service.status().generated_tokens - at_cancel <= 2 + 2
        assert service.status().finished["cancelled"] == 1
        assert not service.status().requests

    serve(tmp_path, use, sequences=1)


def test_a_request_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        first = await service.generate(request(sampling=RAMBLING, max_tokens=300))
        second = await service.generate(request())
        second.cancel()
        second.cancel()
        assert [chunk async for chunk in second] == []
        assert len(service.status().requests) == 1
        first.cancel()

    serve(tmp_path, use, sequences=1)


def test_a_deadline_ends_running_and_waiting_requests(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        running = await service.generate(request(sampling=RAMBLING, max_tokens=400, timeout=0.05))
        waiting = await service.generate(request(timeout=0.03))
        for answer in (running, waiting):
            with pytest.raises(DeadlineError, match="s are over"):
                async for _ in answer:
                    pass
        assert await text(service, request(max_tokens=2))

    serve(tmp_path, use, sequences=1)


def test_clients_take_turns(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        done: list[str] = []

        async def follow(client: str) -> None:
            await text(service, request(max_tokens=4, client=client))
            done.append(client)

        blocker = await service.generate(request(sampling=RAMBLING, max_tokens=400))
        await anext(blocker)
        tasks = [asyncio.create_task(follow("greedy")) for _ in range(6)]
        await asyncio.sleep(0.02)
        tasks.append(asyncio.create_task(follow("modest")))
        await asyncio.sleep(0.02)
        blocker.cancel()
        await asyncio.gather(*tasks)
        assert done.index("modest") <= 1

    serve(tmp_path, use, sequences=1)


def test_what_a_prompt_shares_with_the_one_before_is_not_computed_again(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        async def reused(prompt: str) -> int:
            async with await service.generate(request(prompt, max_tokens=2)) as answer:
                async for _ in answer:
                    pass
                assert answer.usage is not None
                return answer.usage.reused_tokens

        start = "Ada lives in a city. " * 10
        assert await reused(start + "Who?") == 0
        assert await reused(start + "Where?") > 40

    serve(tmp_path, use)


def test_logprobs_are_those_of_the_model(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        chunks: list[Chunk] = []
        async with await service.generate(request(max_tokens=4, logprobs=3)) as answer:
            chunks = [chunk async for chunk in answer]
        for logprob in (one for chunk in chunks for one in chunk.logprobs):
            assert len(logprob.top) == 3
            # Greedy: the token is the likeliest one.
            assert logprob.top[0][0] == logprob.token and logprob.top[0][2] == logprob.logprob <= 0
            assert logprob.top[0][2] >= logprob.top[1][2] >= logprob.top[2][2]

    serve(tmp_path, use)


def test_embeddings_have_length_one_and_tell_texts_apart(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        found = await service.embed(["Paul Colton lives here.", "Paul Colton lives here.", "A story."])
        first, again, other = found.vectors
        assert first == pytest.approx(again, abs=1e-6)
        assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
        assert sum(a * b for a, b in zip(first, other, strict=True)) < 0.99

    serve(tmp_path, use)


def test_refusals(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        with pytest.raises(ModelNotFoundError, match="nosuch"):
            await service.generate(request(model="nosuch"))
        with pytest.raises(ContextOverflowError, match="context holds 512"):
            await service.generate(request("word " * 600))
        with pytest.raises(RequestError, match="token ids"):
            await service.generate(GenerationRequest(prompt=(10**6,)))
        with pytest.raises(RequestError, match="either a prompt or messages"):
            GenerationRequest()
        # A client chooses among the store's models; a path is no name.
        with pytest.raises(ModelNotFoundError):
            await service.generate(request(model="/etc/passwd"))

    serve(tmp_path, use)


def test_stopping_finishes_what_runs_and_refuses_what_is_new(tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(Config(model=ModelConfig(threads=1)), store=ModelStore(tmp_path))
        await service.start()
        assert service.ready
        answer = await service.generate(request(sampling=RAMBLING, max_tokens=40))
        stopping = asyncio.create_task(service.stop(30))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="stopping"):
            await service.generate(request())
        assert not service.ready
        chunks = [chunk async for chunk in answer]
        assert sum(len(chunk.tokens) for chunk in chunks) == answer.usage.generated_tokens  # type: ignore[union-attr]
        await stopping

    asyncio.run(run())


def test_what_does_not_finish_in_time_is_told_so(tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(Config(model=ModelConfig(threads=1)), store=ModelStore(tmp_path))
        await service.start()
        answer = await service.generate(request(sampling=RAMBLING, max_tokens=400))
        await service.stop(0.0)
        with pytest.raises(UnavailableError, match="stops before"):
            async for _ in answer:
                pass

    asyncio.run(run())


def test_models_are_loaded_when_asked_for_and_the_oldest_gives_way(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        service.store.add_file("second", service.store.resolve("demo").path)
        assert [model.name for model in service.loaded()] == ["demo"]
        assert await text(service, request(model="second", max_tokens=2))
        assert [model.name for model in service.loaded()] == ["second"]
        await service.unload("second")
        assert service.loaded() == []
        await service.remove("second")
        assert [model.name for model in service.models()] == ["demo"]
        with pytest.raises(ModelNotFoundError):
            await service.load("second")

    serve(tmp_path, use)


def test_an_idle_daemon_stays_ready_by_probing(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        before = await text(service, request(max_tokens=8))
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert service.ready, service.status().reason
        # The probes left the cache as it was.
        async with await service.generate(request(max_tokens=8)) as answer:
            assert "".join([chunk.text async for chunk in answer]) == before
            assert answer.usage is not None and answer.usage.reused_tokens > 0

    serve(tmp_path, use, SchedulingConfig(ready_seconds=0.45))
