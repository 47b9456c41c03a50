"""Edits through both clients, against a real daemon."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from edit_requests import BEFORE, LONG, PROMPT, QUICK, answer, logprobs
from grpc_fixture import GrpcDaemon

from edge_runtime.client import AsyncClient, Client
from edge_runtime.client.adapter_files import AdapterWriter
from edge_runtime.daemon import adapter_exchange
from edge_runtime.errors import AdapterFileError, AdapterNotFoundError, RequestError, UnavailableError


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def client(daemon: GrpcDaemon) -> Iterator[Client]:
    """A client; what a test has applied is undone after it."""
    with Client(daemon.address) as made:
        yield made
        for edit in reversed(made.edits.list()):
            if edit.state == "applied":
                made.edits.revert(edit.name)


def test_an_edit_with_asyncio(daemon: GrpcDaemon, client: Client) -> None:
    async def use() -> None:
        async with AsyncClient(daemon.address) as made:
            async with await made.edits.apply(*QUICK.texts, name="async") as making:
                assert making.edit.state == "queued"
                stages = {moment.stage async for moment in making}
            assert {"searching", "checking"} <= stages
            edit = making.edit
            assert edit.state == "applied"
            assert await made.edits.show("async") == edit
            assert edit in await made.edits.list("demo")
            assert await made.edits.list("other") == ()
            async with aclosing(made.edits.evaluate(["async"])) as found:
                assert [evaluation.name async for evaluation in found] == ["async"]
            assert (await made.edits.revert("async")).state == "reverted"
            assert (await made.edits.reapply("async")).state == "applied"
            with pytest.raises(RequestError, match="revert it first"):
                await made.edits.remove("async")
            await made.edits.revert("async")
            assert (await made.edits.remove("async")).name == "async"
            assert await made.edits.list() == ()
            with pytest.raises(AdapterNotFoundError):
                await made.edits.follow("absent")

    asyncio.run(asyncio.wait_for(use(), 60))


def test_leaving_or_cancelling_with_asyncio(daemon: GrpcDaemon, client: Client) -> None:
    async def use() -> None:
        async with AsyncClient(daemon.address) as made:
            making = await made.edits.apply(*LONG.texts, name="left")
            await anext(making)
            making.close()
            again = await made.edits.follow("left")
            async for moment in again:
                if moment.stage == "searching":
                    break
            assert (await made.edits.cancel("left")).error == "cancelled"
            assert (await again.result()).state == "failed"
            making = await made.edits.forget([(PROMPT, QUICK.subject)], refusal="no", steps=1)
            assert (await making.result()).kind == "forget"

    asyncio.run(asyncio.wait_for(use(), 60))


@pytest.mark.parametrize("form", ["gguf", "peft"])
def test_an_edit_travels_as_files(client: Client, tmp_path: Path, form: str) -> None:
    path = tmp_path / ("home.gguf" if form == "gguf" else "home")
    made = client.edits.apply(*QUICK.texts, name=f"made-{form}").result()
    with_it = logprobs(client)
    client.edits.export([made.name], path)
    names = [path.name] if form == "gguf" else ["adapter_config.json", "adapter_model.safetensors"]
    folder = tmp_path if form == "gguf" else path
    assert sorted(file.name for file in folder.iterdir()) == names
    client.edits.revert(made.name)
    found = client.edits.import_adapter(path, f"back-{form}")
    assert (found.kind, found.state, found.fact) == ("lora", "applied", None)
    assert answer(client) == QUICK.target
    assert logprobs(client) == pytest.approx(with_it, abs=1e-4), "scales are folded in when it is written"
    with pytest.raises(RequestError, match="imported; only edits have checks"):
        list(client.edits.evaluate([found.name]))
    client.edits.revert(found.name)
    assert answer(client) == BEFORE


def test_files_travel_with_asyncio(daemon: GrpcDaemon, client: Client, tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncClient(daemon.address) as made:
            edit = await (await made.edits.apply(*QUICK.texts)).result()
            await made.edits.export([edit.name], tmp_path / "it.gguf")
            await made.edits.revert(edit.name)
            back = await made.edits.import_adapter(tmp_path / "it.gguf", "again")
            assert back.state == "applied"

    asyncio.run(asyncio.wait_for(use(), 60))


def test_what_is_no_adapter_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="is not there"):
        client.edits.import_adapter(tmp_path / "absent.gguf", "x")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is not there"):
        client.edits.import_adapter(tmp_path, "x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AdapterFileError, match=r"^adapter\.gguf "):  # not where the daemon put it
        client.edits.import_adapter(tmp_path / "bad.gguf", "x")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError):
        client.edits.import_adapter(tmp_path, "x")


def test_what_cannot_be_exported_leaves_what_was_there(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    path.write_text("mine")
    with pytest.raises(AdapterNotFoundError):
        client.edits.export(["absent"], path)
    with pytest.raises(RequestError, match="no edit is named"):
        client.edits.export([], path)
    with client.edits.apply(*LONG.texts) as making:
        client.edits.cancel(making.edit.name)
    with pytest.raises(RequestError, match="has changed nothing"):
        client.edits.export([making.edit.name], path)
    assert path.read_text() == "mine"
    assert [one.name for one in tmp_path.iterdir()] == ["it.gguf"]


def test_a_stream_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    path.write_text("mine")
    with pytest.raises(UnavailableError), AdapterWriter(path, "gguf") as writer:
        writer.take("adapter.gguf", b"half")
        raise UnavailableError("the connection broke")
    assert path.read_text() == "mine"
    with AdapterWriter(path, "gguf") as writer:
        writer.take("adapter.gguf", b"wh")
        writer.take("", b"ole")
    assert path.read_text() == "whole"
    assert [one.name for one in tmp_path.iterdir()] == ["it.gguf"]
    with pytest.raises(AdapterFileError), AdapterWriter(path, "gguf") as writer:
        writer.take("../up", b"")


def test_files_that_do_not_belong_to_an_adapter_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_exchange, "MAX_BYTES", 10)
    gathering = adapter_exchange.Gathering(tmp_path, adapter_exchange.names_of("peft"))
    with pytest.raises(AdapterFileError, match="before the name"):
        gathering.take("", b"x")
    for name in ("../adapter_config.json", "other", "/etc/passwd"):
        with pytest.raises(AdapterFileError, match=r"wanted is adapter_config\.json, adapter_model"):
            gathering.take(name, b"x")
    gathering.take("adapter_config.json", b"12345")
    with pytest.raises(AdapterFileError, match="wanted is adapter_model"):
        gathering.take("adapter_config.json", b"again")
    with pytest.raises(AdapterFileError, match="without adapter_model"):
        gathering.end()
    gathering.take("adapter_model.safetensors", b"12345")
    gathering.end()
    with pytest.raises(AdapterFileError, match="more than 10 bytes"):
        gathering.take("", b"x")
    assert (tmp_path / "adapter_config.json").read_text() == "12345"


def test_wrong_arguments_are_refused_without_a_daemon() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(RequestError, match="give a list"):
            client.edits.apply(*QUICK.texts, paraphrases="one text")
        with pytest.raises(RequestError, match="prompt, subject"):
            client.edits.forget(["text"])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="no such option: temperature"):
            client.edits.apply(*QUICK.texts, temperature=1)  # type: ignore[call-arg]
        with pytest.raises(UnavailableError):
            client.edits.apply(*QUICK.texts)
