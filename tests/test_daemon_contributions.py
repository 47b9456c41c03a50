"""The wish for a mode and a quality on its way in, and the counts of contributions on their way out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from daemon_fixture import RunningDaemon
from grpc_fixture import GrpcDaemon
from openai import OpenAI
from spread_answer import COUNTS, answers_with

from edge_runtime import client
from edge_runtime.client import AsyncClient, Client
from edge_runtime.daemon.openai_format import usage_json
from edge_runtime.daemon.requests import ContributionCounts, Usage
from edge_runtime.v1 import inference_pb2 as pb
from edge_runtime.v1 import inference_pb2_grpc

PROMPT = "The home of Paul Colton is in"
QUESTION = [{"role": "user", "content": "Where is the home of Paul Colton?"}]
TURN = pb.ChatMessage(role="user", content="Where is the home of Paul Colton?")
COUNTS_JSON = {"on_time": 87.0, "late": [9.5, 2.5], "lost": 0.25, "recomputed": 0.75, "fell_back": True}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("grpc")) as running:
        yield running


@pytest.fixture(scope="module")
def http_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with RunningDaemon(tmp_path_factory.mktemp("http")) as running:
        yield running


@pytest.fixture
def stub(daemon: GrpcDaemon) -> Iterator[Any]:
    with grpc.insecure_channel(daemon.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def own_client(daemon: GrpcDaemon) -> Iterator[Client]:
    with Client(daemon.address) as made:
        yield made


@pytest.fixture
def openai_client(http_daemon: RunningDaemon) -> Iterator[OpenAI]:
    with OpenAI(base_url=http_daemon.url + "/v1", api_key=http_daemon.token("tests"), max_retries=0) as made:
        yield made
    http_daemon.tokens.revoke("tests")


# --- gRPC -------------------------------------------------------------------------------------


def test_alone_every_mode_gives_the_same_messages_and_no_contributions(stub: Any) -> None:
    def messages(**wishes: Any) -> list[Any]:
        sampling = pb.Sampling(temperature=0)
        return list(stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling, max_tokens=6, **wishes)))

    plain = messages()
    for mode in (pb.MODE_EXACT, pb.MODE_RELAXED):
        found = messages(mode=mode, quality=0.9)
        assert [message.chunk for message in found[1:-1]] == [message.chunk for message in plain[1:-1]]
        assert not found[-1].finished.HasField("contributions")


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        ({"mode": 3}, "mode = 3"),
        ({"mode": -1}, "mode = -1"),
        ({"quality": 0.0}, "quality = 0.0"),
        ({"quality": 1.01}, "quality = 1.01"),
        ({"quality": float("nan")}, "quality"),
    ],
)
def test_a_mode_or_quality_that_there_is_not_is_an_invalid_argument(
    stub: Any, wishes: dict[str, Any], named: str
) -> None:
    for call in (
        stub.Generate(pb.GenerateRequest(text=PROMPT, **wishes)),
        stub.Chat(pb.ChatRequest(messages=[TURN], **wishes)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())["edgert-code"] == "invalid_request"
        assert named in error.details()


def test_grpc_carries_the_wishes_in_and_the_counts_out(
    daemon: GrpcDaemon, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers_with(COUNTS, daemon.service, monkeypatch)
    wishes: dict[str, Any] = {"mode": pb.MODE_RELAXED, "quality": 0.97}
    for messages in (
        stub.Generate(pb.GenerateRequest(text=PROMPT, **wishes)),
        stub.Chat(pb.ChatRequest(messages=[TURN], **wishes)),
    ):
        counts = list(messages)[-1].finished.contributions
        assert (counts.on_time, list(counts.late), counts.lost) == (87.0, [9.5, 2.5], 0.25)
        assert (counts.recomputed, counts.fell_back) == (0.75, True)
    list(stub.Generate(pb.GenerateRequest(text=PROMPT, mode=pb.MODE_EXACT)))
    list(stub.Generate(pb.GenerateRequest(text=PROMPT)))
    found = [(request.mode, request.quality) for request in asked]
    assert found == [("relaxed", 0.97), ("relaxed", 0.97), ("exact", None), ("", None)]


# --- clients ----------------------------------------------------------------------------------


def test_alone_every_mode_gives_the_same_text_and_no_contributions(own_client: Client) -> None:
    plain = own_client.generate(PROMPT, max_tokens=6, temperature=0.0)
    exact = own_client.generate(PROMPT, max_tokens=6, temperature=0.0, mode="exact", quality=None)
    relaxed = own_client.generate(PROMPT, max_tokens=6, temperature=0.0, mode="relaxed", quality=0.9)
    assert plain.text() == exact.text() == relaxed.text()
    for stream in (plain, exact, relaxed):
        assert stream.usage is not None and stream.usage.contributions is None


def test_both_clients_carry_the_wishes_in_and_the_counts_out(
    daemon: GrpcDaemon, own_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers_with(COUNTS, daemon.service, monkeypatch)
    wanted = client.ContributionCounts(87.0, (9.5, 2.5), 0.25, 0.75, True)
    for stream in (
        own_client.generate(PROMPT, mode="relaxed", quality=0.97),
        own_client.chat(QUESTION, mode="relaxed", quality=0.97),
    ):
        stream.text()
        assert stream.usage is not None and stream.usage.contributions == wanted

    async def use() -> None:
        async with AsyncClient(daemon.address) as asynchronous:
            stream = await asynchronous.generate(PROMPT, mode="exact", quality=1)
            await stream.text()
            assert stream.usage is not None and stream.usage.contributions == wanted
            await (await asynchronous.chat(QUESTION, mode=None)).text()

    asyncio.run(use())
    found = [(request.mode, request.quality) for request in asked]
    assert found == [("relaxed", 0.97), ("relaxed", 0.97), ("exact", 1.0), ("", None)]


# --- OpenAI's form ----------------------------------------------------------------------------


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=6, **settings
    )


def complete(client: OpenAI, **settings: Any) -> Any:
    return client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=6, **settings)


def test_alone_every_mode_gives_the_same_choices_and_no_contributions(openai_client: OpenAI) -> None:
    for ask in (chat, complete):
        plain, *others = [
            ask(openai_client, extra_body=own)
            for own in ({}, {"mode": "exact"}, {"mode": "relaxed", "quality": 0.9}, {"mode": None})
        ]
        for other in others:
            assert other.choices == plain.choices
            assert "contributions" not in other.usage.model_dump()


def test_http_carries_the_wishes_in_and_the_counts_out(
    openai_client: OpenAI, http_daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers_with(COUNTS, http_daemon.service, monkeypatch)
    own = {"mode": "relaxed", "quality": 0.97}
    for ask in (chat, complete):
        assert ask(openai_client, extra_body=own).usage.contributions == COUNTS_JSON
        options = {"include_usage": True}
        *_, last = ask(openai_client, extra_body=own, stream=True, stream_options=options)
        assert last.usage.contributions == COUNTS_JSON
        ask(openai_client, extra_body={"mode": "exact"})
    found = [(request.mode, request.quality) for request in asked]
    assert found == [("relaxed", 0.97), ("relaxed", 0.97), ("exact", None)] * 2


def test_contributions_are_those_of_all_choices_together() -> None:
    def took(contributions: ContributionCounts | None) -> Usage:
        return Usage("stop", 1, 5, 2, 3, 0.1, 0.2, 0.3, contributions)

    first = ContributionCounts(0.1, (0.5,), 0.0, 0.0, False)
    second = ContributionCounts(0.2, (0.25, 1.0), 3.0, 0.5, True)
    assert usage_json([took(first), took(None), took(second)])["contributions"] == {
        "on_time": 0.3,
        "late": [0.75, 1.0],
        "lost": 3.0,
        "recomputed": 0.5,
        "fell_back": True,
    }
    assert "contributions" not in usage_json([took(None), took(None)])
