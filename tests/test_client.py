"""The clients against a real daemon: what people write, and what they get."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_fixture import RAMBLING, GrpcDaemon, config_of
from grpc_stubs import wait_until
from http_file_server import FileServer, ServedFile

from edge_runtime.client import AsyncClient, Client
from edge_runtime.errors import (
    ChatTemplateError,
    ContextOverflowError,
    DeadlineError,
    ModelNotFoundError,
    RequestError,
)

PROMPT = "The home of Paul Colton is in"
QUESTION = [{"role": "user", "content": "Where is the home of Paul Colton?"}]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def client(daemon: GrpcDaemon) -> Iterator[Client]:
    with Client(daemon.address) as made:
        yield made


def test_an_answer_comes_in_pieces_and_ends_with_its_usage(client: Client) -> None:
    stream = client.generate(PROMPT, max_tokens=12, temperature=0.0)
    assert stream.model == "demo" and stream.id and stream.prompt_tokens > 3
    assert stream.usage is None
    chunks = list(stream)
    assert len(chunks) > 1
    usage = stream.usage
    assert usage is not None
    assert usage.generated_tokens == sum(len(chunk.tokens) for chunk in chunks)
    assert usage.prompt_tokens == stream.prompt_tokens
    assert usage.finish_reason in ("stop", "length")
    assert stream.text() == "".join(chunk.text for chunk in chunks)
    assert list(stream) == []
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert client.detokenize(tokens).startswith(stream.text())


def test_text_gives_what_was_read_before_as_well(client: Client) -> None:
    stream = client.generate(PROMPT, max_tokens=12, temperature=0.0)
    first = next(stream).text
    whole = stream.text()
    assert whole.startswith(first) and len(whole) > len(first)
    assert whole == client.generate(PROMPT, max_tokens=12, temperature=0.0).text()


def test_every_option_reaches_the_daemon(client: Client) -> None:
    options: dict[str, Any] = {**RAMBLING, "max_tokens": 9}
    first = client.generate(PROMPT, **options)
    again = client.generate(PROMPT, **options)
    assert first.text() == again.text()
    assert first.usage is not None and first.usage.seed == 2
    assert first.usage.finish_reason == "length" and first.usage.generated_tokens == 9
    other = client.generate(PROMPT, **{**options, "seed": 2**64 - 1})
    assert other.text() != first.text()
    assert other.usage is not None and other.usage.seed == 2**64 - 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 101.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("penalty_window", -2),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("quality", 0.0),
        ("quality", 1.01),
        ("quality", math.nan),
    ],
)
def test_a_value_out_of_range_is_named(client: Client, option: str, value: float) -> None:
    with pytest.raises(RequestError, match=option):
        client.generate(PROMPT, **{option: value})  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("top_k", 2**40),
        ("max_tokens", "many"),
        ("stop", "\ud800"),
        ("stop", 3),
        ("mode", "fast"),
        ("mode", ""),
        ("mode", 1),
        ("mode", ["exact"]),
        ("quality", "high"),
    ],
)
def test_a_value_that_no_message_can_hold_is_refused_here(client: Client, option: str, value: object) -> None:
    with pytest.raises(RequestError, match=option):
        client.generate(PROMPT, **{option: value})  # type: ignore[misc]


def test_an_unknown_option_is_a_mistake_in_the_program(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate(PROMPT, temprature=1.0)  # type: ignore[call-arg]


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=12, **RAMBLING).text()
    word = whole[len(whole) // 2 :][:4]
    stream = client.generate(PROMPT, max_tokens=12, stop=word, **RAMBLING)
    assert stream.text() == whole[: whole.index(word)]
    assert stream.usage is not None and stream.usage.finish_reason == "stop"


def test_log_probabilities_come_with_their_alternatives(client: Client) -> None:
    stream = client.generate(PROMPT, temperature=0.0, logprobs=3)
    chunks = list(stream)
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token for entry in entries] == [token for chunk in chunks for token in chunk.tokens]
    assert b"".join(entry.raw for entry in entries).decode() == stream.text()
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top) == 3
        assert entry.top[0].token == entry.token and entry.top[0].raw == entry.raw
        assert entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob


def test_a_conversation_is_answered(client: Client) -> None:
    stream = client.chat(QUESTION, max_tokens=24, temperature=0.0)
    assert stream.text().strip()
    assert stream.prompt_tokens > len(client.tokenize(QUESTION[0]["content"]))


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], ["hello"], [{"role": "", "content": "", "x": ""}]]
)
def test_a_conversation_without_sense_is_refused(client: Client, messages: Any) -> None:
    with pytest.raises(RequestError, match="message"):
        client.chat(messages)


def test_tokens_in_and_out(client: Client) -> None:
    tokens = client.tokenize("Two words")
    assert tokens[0] != client.tokenize("Two words", add_bos=False)[0]
    assert client.detokenize(client.tokenize("Two words", add_bos=False)).strip() == "Two words"
    by_tokens = client.generate(client.tokenize(PROMPT), max_tokens=8, temperature=0.0).text()
    assert by_tokens == client.generate(PROMPT, max_tokens=8, temperature=0.0).text()
    with pytest.raises(RequestError):
        client.detokenize([10**6])
    with pytest.raises(RequestError):
        client.generate([10**6])


def test_embeddings_have_length_one_and_know_what_is_alike(client: Client) -> None:
    result = client.embed([PROMPT, PROMPT, client.tokenize("The sea")])
    assert len(result.vectors) == 3 and result.prompt_tokens > 10
    assert [math.fsum(x * x for x in vector) for vector in result.vectors] == pytest.approx(
        [1.0] * 3, abs=1e-5
    )
    assert result.vectors[0] == result.vectors[1] != result.vectors[2]
    assert client.embed(PROMPT).vectors[0] == result.vectors[0]
    with pytest.raises(RequestError, match="at least one"):
        client.embed([])


def test_close_frees_the_place(daemon: GrpcDaemon, client: Client) -> None:
    before = daemon.finished("cancelled")
    stream = client.generate(PROMPT, **RAMBLING)
    next(stream)
    assert [request.id for request in client.status().requests] == [stream.id]
    stream.close()
    stream.close()
    assert list(stream) == []
    wait_until(lambda: daemon.finished("cancelled") == before + 1, "the request has gone")


def test_a_stream_that_is_dropped_frees_the_place(daemon: GrpcDaemon, client: Client) -> None:
    before = daemon.finished("cancelled")
    for _ in client.generate(PROMPT, **RAMBLING):
        break
    wait_until(lambda: daemon.finished("cancelled") == before + 1, "the request has gone")


def test_a_stream_closed_by_another_thread_ends(client: Client) -> None:
    stream = client.generate(PROMPT, **RAMBLING)
    threading.Timer(0.05, stream.close).start()
    count = sum(1 for _ in stream)
    assert stream.usage is None or count > 0
    wait_until(lambda: not client.status().requests, "the request has gone")


def test_the_time_of_a_call_is_limited(daemon: GrpcDaemon, client: Client) -> None:
    with pytest.raises(DeadlineError):
        client.generate(PROMPT, timeout=0.1, **RAMBLING).text()
    wait_until(lambda: not client.status().requests, "the request has gone")
    with Client(daemon.address, timeout=0.1) as hasty, pytest.raises(DeadlineError):
        hasty.generate(PROMPT, **RAMBLING).text()
    with pytest.raises(RequestError, match="timeout"):
        client.generate(PROMPT, timeout=0.0)


def test_too_long_a_prompt_and_too_large_a_message_are_told_apart(client: Client) -> None:
    with pytest.raises(ContextOverflowError):
        client.generate("word " * 20_000)
    with pytest.raises(RequestError, match="max_body_bytes"):
        client.generate("word " * 1_000_000)


def test_models_are_listed_described_loaded_and_unloaded(client: Client) -> None:
    (demo,) = [model for model in client.models.list() if model.name == "demo"]
    assert demo.source == "built in" and demo.loaded
    description = client.models.describe()
    assert description == client.models.describe("demo")
    assert description.architecture == "llama" and sum(description.quantization.values()) == pytest.approx(1)
    loaded = client.models.load("demo")
    assert loaded in client.status().models and loaded.threads == 1
    client.models.unload("demo")
    assert client.status().models == ()
    assert client.models.load().name == "demo"
    for call in (client.models.describe, client.models.load, client.models.remove):
        with pytest.raises(ModelNotFoundError, match="absent"):
            call("absent")
    with pytest.raises(RequestError, match="demo"):
        client.models.remove("demo")
    with pytest.raises(RequestError, match="name"):
        client.models.remove("")
    with pytest.raises(ModelNotFoundError):
        client.generate(PROMPT, model="absent")


def test_a_model_is_pulled_used_and_removed(
    tmp_path: Path, tiny_model: Path, file_server: FileServer
) -> None:
    source = file_server.serve("/tiny.gguf", ServedFile(tiny_model.read_bytes()))
    with (
        GrpcDaemon(tmp_path, config_of(model={"max_loaded": 2})) as daemon,
        Client(daemon.address) as client,
    ):
        steps = list(client.models.pull(source, name="small"))
        assert steps[-1].model is not None and steps[-1].model.name == "small"
        assert steps[-1].done_bytes == steps[-1].total_bytes == tiny_model.stat().st_size
        assert [step.model for step in steps[:-1]] == [None] * (len(steps) - 1)
        assert client.generate("a", model="small", max_tokens=2).text() is not None
        with pytest.raises(ChatTemplateError):
            client.chat(QUESTION, model="small")
        client.models.remove("small")
        assert [model.name for model in client.models.list()] == ["demo"]
        with pytest.raises(RequestError, match="source"):
            list(client.models.pull("nothing"))


def test_the_async_client_does_all_that_the_other_does(daemon: GrpcDaemon, client: Client) -> None:
    async def use() -> None:
        async with AsyncClient(daemon.address) as asynchronous:
            stream = await asynchronous.generate(PROMPT, max_tokens=8, temperature=0.0, logprobs=1)
            chunks = [chunk async for chunk in stream]
            assert chunks == list(client.generate(PROMPT, max_tokens=8, temperature=0.0, logprobs=1))
            assert stream.usage is not None and stream.model == "demo"
            assert await stream.text() == "".join(chunk.text for chunk in chunks)
            answer = await asynchronous.chat(QUESTION, max_tokens=8, temperature=0.0)
            assert await answer.text() == client.chat(QUESTION, max_tokens=8, temperature=0.0).text()
            assert await asynchronous.tokenize(PROMPT) == client.tokenize(PROMPT)
            assert await asynchronous.detokenize([5, 6]) == client.detokenize([5, 6])
            assert await asynchronous.embed([PROMPT]) == client.embed([PROMPT])
            assert await asynchronous.models.list() == client.models.list()
            assert await asynchronous.models.describe() == client.models.describe()
            assert await asynchronous.models.load() == client.models.load()
            with pytest.raises(RequestError, match="demo"):
                await asynchronous.models.remove("demo")
            with pytest.raises(RequestError, match="source"):
                [step async for step in asynchronous.models.pull("nothing")]
            before = daemon.shutdowns
            await asynchronous.shutdown()
            assert daemon.shutdowns == before + 1

    asyncio.run(use())


def test_an_async_stream_can_be_left(daemon: GrpcDaemon) -> None:
    async def cancelled(client: AsyncClient) -> int:
        return (await client.status()).finished.get("cancelled", 0)

    async def use() -> None:
        async with AsyncClient(daemon.address) as asynchronous:
            before = await cancelled(asynchronous)
            async with await asynchronous.generate(PROMPT, **RAMBLING) as stream:
                async for _ in stream:
                    break
            assert [chunk async for chunk in stream] == []
            while await cancelled(asynchronous) == before:
                await asyncio.sleep(0.01)
            closed = await asynchronous.generate(PROMPT, **RAMBLING)
            asyncio.get_running_loop().call_later(0.05, closed.close)
            await closed.text()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await (await asynchronous.generate(PROMPT, **RAMBLING)).text()
            with pytest.raises(DeadlineError):
                await (await asynchronous.generate(PROMPT, timeout=0.1, **RAMBLING)).text()

    asyncio.run(asyncio.wait_for(use(), 60))


def test_both_clients_offer_the_same() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    from edge_runtime import client

    for name in ("Client", "Models", "Stream", "Edits", "EditStream"):
        assert public(getattr(client, name)) == public(getattr(client, f"Async{name}"))


def test_importing_the_client_brings_no_engine() -> None:
    program = (
        "import sys, json, edge_runtime.client; "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('numpy', 'llama_cpp', 'starlette') "
        "or m.startswith('edge_runtime.')]))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    modules = json.loads(done.stdout)
    of_cluster = {name for name in modules if name.startswith("edge_runtime.cluster")}
    assert of_cluster == {"edge_runtime.cluster", "edge_runtime.cluster.report"}  # plain values alone
    of_edits = {name for name in modules if name.startswith("edge_runtime.personalize")}
    assert of_edits == {"edge_runtime.personalize", "edge_runtime.personalize.edit_report"}
    loaded = {".".join(name.split(".")[:2]) for name in modules} - {
        "edge_runtime.cluster",
        "edge_runtime.personalize",
    }
    assert loaded == {
        "edge_runtime.client",
        "edge_runtime.error_catalog",
        "edge_runtime.errors",
        "edge_runtime.v1",
    }
