"""The wish for adapters on its way in: gRPC, HTTP and both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from daemon_fixture import RunningDaemon
from demo_adapters import COUNT, PROMPT, Strengths, expected, keep
from grpc_fixture import GrpcDaemon
from openai import BadRequestError, NotFoundError, OpenAI

from edge_runtime.client import AsyncClient, Client
from edge_runtime.daemon.adapters import STORE_NAME
from edge_runtime.errors import AdapterNotFoundError, RequestError
from edge_runtime.personalize.store import AdapterStore
from edge_runtime.v1 import inference_pb2 as pb
from edge_runtime.v1 import inference_pb2_grpc

TURN = pb.ChatMessage(role="user", content="Where is the home of Paul Colton?")
OPTIONS: dict[str, Any] = {"max_tokens": COUNT, "temperature": 0.0}
ALL: Strengths = {"one": 1.0, "two": 1.0, "three": 1.0}
# how a client may say it -> what it means
CHOICES: list[tuple[Any, Strengths]] = [
    (None, ALL),
    ((), {}),
    ([], {}),
    ({}, {}),
    (["one"], {"one": 1.0}),
    (("three", "one"), {"one": 1.0, "three": 1.0}),
    ({"one": 0.6}, {"one": 0.6}),
    ({"two": 0.0}, {}),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    home = tmp_path_factory.mktemp("grpc")
    keep(AdapterStore(home / STORE_NAME), *ALL)
    with GrpcDaemon(home) as running:
        yield running


@pytest.fixture(scope="module")
def openai_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    home = tmp_path_factory.mktemp("http")
    keep(AdapterStore(home / STORE_NAME), *ALL)
    with (
        RunningDaemon(home) as running,
        OpenAI(base_url=running.url + "/v1", api_key=running.token("tests"), max_retries=0) as made,
    ):
        yield made


@pytest.fixture
def stub(daemon: GrpcDaemon) -> Iterator[Any]:
    with grpc.insecure_channel(daemon.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


# --- gRPC and its clients ---------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "meaning"), CHOICES)
def test_both_clients_say_which_adapters_to_use(daemon: GrpcDaemon, choice: Any, meaning: Strengths) -> None:
    async def with_asyncio() -> str:
        async with AsyncClient(daemon.address) as client:
            return await (await client.generate(PROMPT, adapters=choice, **OPTIONS)).text()

    with Client(daemon.address) as client:
        assert client.generate(PROMPT, adapters=choice, **OPTIONS).text() == expected(meaning)
    assert asyncio.run(with_asyncio()) == expected(meaning)


def test_a_conversation_takes_them_too(daemon: GrpcDaemon) -> None:
    with Client(daemon.address) as client:
        turns: Any = [{"role": "user", "content": "Where is the home of Paul Colton?"}]
        found = {client.chat(turns, adapters=choice, **OPTIONS).text() for choice in (None, (), ["one"])}
    assert len(found) == 3


def test_an_unknown_adapter_is_told_with_those_that_there_are(daemon: GrpcDaemon) -> None:
    with Client(daemon.address) as client, pytest.raises(AdapterNotFoundError, match=r"'four'.*'three'"):
        client.generate(PROMPT, adapters=["four"], **OPTIONS).text()


@pytest.mark.parametrize("choice", [{"one": 11.0}, {"one": float("nan")}, ["one", "one"]])
def test_what_cannot_be_chosen_is_refused(daemon: GrpcDaemon, choice: Any) -> None:
    with Client(daemon.address) as client, pytest.raises(RequestError, match="adapter"):
        client.generate(PROMPT, adapters=choice, **OPTIONS).text()


@pytest.mark.parametrize("choice", ["one", 3, [3], {"one": "much"}, {3: 1.0}, [["one"]]])
def test_what_no_message_can_hold_is_refused_by_the_client(daemon: GrpcDaemon, choice: Any) -> None:
    with Client(daemon.address) as client, pytest.raises(RequestError):
        client.generate(PROMPT, adapters=choice, **OPTIONS)


def test_none_and_some_exclude_each_other(stub: Any) -> None:
    wishes: dict[str, Any] = {"adapters": [pb.AdapterChoice(name="one")], "no_adapters": True}
    for call in (
        stub.Generate(pb.GenerateRequest(text=PROMPT, **wishes)),
        stub.Chat(pb.ChatRequest(messages=[TURN], **wishes)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no_adapters" in error.details()


# --- HTTP -------------------------------------------------------------------------------------


def complete(client: OpenAI, **more: Any) -> str:
    answer = client.completions.create(
        model="", prompt=PROMPT, max_tokens=COUNT, temperature=0, extra_body=more
    )
    return answer.choices[0].text


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        (None, ALL),
        ([], {}),
        (["one"], {"one": 1.0}),
        ([{"name": "one", "strength": 0.6}], {"one": 0.6}),
        (["one", {"name": "three"}], {"one": 1.0, "three": 1.0}),
        ([{"name": "one", "strength": None}], {"one": 1.0}),
    ],
)
def test_http_says_which_adapters_to_use(openai_client: OpenAI, choice: Any, meaning: Strengths) -> None:
    assert complete(openai_client, adapters=choice) == expected(meaning)


def test_a_chat_over_http_takes_them_too(openai_client: OpenAI) -> None:
    def answer(**more: Any) -> str | None:
        made = openai_client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "Where is the home of Paul Colton?"}],
            temperature=0,
            max_tokens=COUNT,
            extra_body=more,
        )
        return made.choices[0].message.content

    assert len({answer(), answer(adapters=[]), answer(adapters=["one"])}) == 3


def test_an_unknown_adapter_is_not_found(openai_client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as raised:
        complete(openai_client, adapters=["four"])
    assert raised.value.code == "adapter_not_found"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("one", "adapters"),
        ({"one": 1.0}, "adapters"),
        ([3], "adapters[0]"),
        (["one", None], "adapters[1]"),
        ([{"strength": 1.0}], "adapters[0].name"),
        ([{"name": "one", "strength": "much"}], "adapters[0].strength"),
        ([{"name": "one", "weight": 1.0}], "adapters[0].weight"),
        (["one", "one"], None),
        ([{"name": "one", "strength": 11}], None),
        (["one"] * 300, None),
    ],
)
def test_what_is_no_choice_of_adapters_is_refused(
    openai_client: OpenAI, choice: Any, param: str | None
) -> None:
    with pytest.raises(BadRequestError) as raised:
        complete(openai_client, adapters=choice)
    assert raised.value.param == param
