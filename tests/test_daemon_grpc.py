"""The gRPC API seen from the wire: messages, statuses, metadata, limits."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_fixture import RAMBLING, GrpcDaemon, config_of
from grpc_health.v1 import health_pb2
from grpc_stubs import GREEDY, LONG, PROMPT, Stubs, failed, wait_until
from program import REPOSITORY

from edge_runtime.daemon.grpc_boundary import METHOD_SCOPES
from edge_runtime.error_catalog import INTERNAL_MESSAGE
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.grpc_guard import MAX_MESSAGE_BYTES
from edge_runtime.v1 import (
    daemon_pb2,
    inference_pb2,
    models_pb2,
    personalization_pb2,
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def stubs(daemon: GrpcDaemon) -> Iterator[Stubs]:
    with Stubs(daemon.address) as made:
        yield made


# --- messages ---------------------------------------------------------------------------------


def test_a_stream_is_one_start_then_chunks_then_one_end(stubs: Stubs) -> None:
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=GREEDY, logprobs=2)
    messages = list(stubs.inference.Generate(request))
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["started", *["chunk"] * (len(kinds) - 2), "finished"]
    started, chunks, finished = messages[0].started, messages[1:-1], messages[-1].finished
    assert started.id and started.model == "demo" and started.prompt_tokens == finished.prompt_tokens > 0
    tokens = [token for message in chunks for token in message.chunk.tokens]
    assert len(tokens) == finished.generated_tokens
    logprobs = [entry for message in chunks for entry in message.chunk.logprobs]
    assert [entry.token for entry in logprobs] == tokens and {len(entry.top) for entry in logprobs} == {2}
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert finished.prefill_seconds > 0 and finished.queue_seconds >= 0


def test_what_is_not_set_has_the_defaults_that_the_messages_document(stubs: Stubs) -> None:
    plain = inference_pb2.GenerateRequest(text=PROMPT, max_tokens=6, sampling=inference_pb2.Sampling(seed=7))
    spelled = inference_pb2.GenerateRequest(
        text=PROMPT,
        max_tokens=6,
        sampling=inference_pb2.Sampling(
            seed=7,
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            repetition_penalty=1,
            frequency_penalty=0,
            presence_penalty=0,
            penalty_window=64,
        ),
    )

    def chunks(request: Any) -> list[Any]:
        return [message.chunk for message in stubs.inference.Generate(request)]

    assert chunks(plain) == chunks(spelled)


def test_zero_and_false_are_values_and_not_the_default(stubs: Stubs) -> None:
    firsts = set()
    for seed in range(8):
        sampling = inference_pb2.Sampling(**{**RAMBLING, "temperature": 0.0, "seed": seed})
        request = inference_pb2.GenerateRequest(text="The", max_tokens=1, sampling=sampling)
        firsts.add(list(stubs.inference.Generate(request))[1].chunk.tokens[0])
    assert len(firsts) == 1
    request = inference_pb2.GenerateRequest(text=PROMPT, max_tokens=1, logprobs=0)
    (entry,) = list(stubs.inference.Generate(request))[1].chunk.logprobs
    assert entry.raw and not entry.top
    tokenize = stubs.inference.Tokenize
    plain = tokenize(inference_pb2.TokenizeRequest(text="word")).tokens
    assert plain == tokenize(inference_pb2.TokenizeRequest(text="word", add_bos=True)).tokens
    assert plain[1:] == tokenize(inference_pb2.TokenizeRequest(text="word", add_bos=False)).tokens


def test_every_field_of_the_messages_is_explained() -> None:
    found = 0
    for path in sorted((REPOSITORY / "proto").rglob("*.proto")):
        before = ""
        for line in path.read_text().splitlines():
            stripped = line.strip()
            if re.match(r"(rpc|service) |[\w.<>, ]+ = \d+;", stripped) and not stripped.startswith(
                "reserved"
            ):
                sole_field = re.match(r"(repeated )?(Model|LoadedModel|Embedding|Edit)s? ?\w* ", stripped)
                assert before.startswith("//") or sole_field, f"{path.name}: nothing explains {stripped}"
                found += 1
            if stripped:
                before = stripped
    assert found > 100


def test_methods_have_their_scopes() -> None:
    modules = (inference_pb2, models_pb2, personalization_pb2, daemon_pb2)
    methods = {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {name for name in METHOD_SCOPES if name.startswith("/edge_runtime.")}
    assert {name for name, scope in METHOD_SCOPES.items() if scope is None} == {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }


# --- failures ---------------------------------------------------------------------------------


def test_a_failure_has_status_code_and_message(stubs: Stubs) -> None:
    cases: list[tuple[Callable[[], Any], str, str, str]] = [
        (
            lambda: stubs.models.Describe(models_pb2.DescribeModelRequest(name="absent")),
            "NOT_FOUND",
            "model_not_found",
            "absent",
        ),
        (
            lambda: list(stubs.inference.Generate(inference_pb2.GenerateRequest())),
            "INVALID_ARGUMENT",
            "invalid_request",
            "prompt",
        ),
        (
            lambda: list(stubs.inference.Chat(inference_pb2.ChatRequest())),
            "INVALID_ARGUMENT",
            "invalid_request",
            "messages",
        ),
        (
            lambda: stubs.inference.Embed(inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput()])),
            "INVALID_ARGUMENT",
            "invalid_request",
            "input",
        ),
        (
            lambda: list(stubs.inference.Generate(inference_pb2.GenerateRequest(text="word " * 9000))),
            "INVALID_ARGUMENT",
            "context_overflow",
            "tokens",
        ),
        (
            lambda: list(stubs.models.Pull(models_pb2.PullModelRequest(source="x", sha256="12"))),
            "INVALID_ARGUMENT",
            "invalid_request",
            "64 hexadecimal digits",
        ),
    ]
    for call, status, code, part in cases:
        found, message, metadata = failed(call)
        assert (found.name, metadata["edgert-code"]) == (status, code), message
        assert part in message and "retry-after-ms" not in metadata


def test_a_full_queue_tells_when_to_try_again(tmp_path: Path) -> None:
    config = config_of(model={"sequences": 1}, scheduling={"queue": 1})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        running = [stubs.inference.Generate(LONG) for _ in range(2)]
        for call in running:
            next(call)
        status, _, metadata = failed(lambda: list(stubs.inference.Generate(LONG)))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED and metadata["edgert-code"] == "overloaded"
        assert int(metadata["retry-after-ms"]) >= 1000
        for call in running:
            call.cancel()


def test_calls_beyond_all_limits_are_refused(tmp_path: Path) -> None:
    config = config_of(model={"sequences": 1}, scheduling={"queue": 0})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        watches = [stubs.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(65)]
        for watch in watches:
            next(watch)
        status, _, _ = failed(lambda: stubs.health.Check(health_pb2.HealthCheckRequest()))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches.pop().cancel()
        wait_until(lambda: serves(stubs), "a place is free again")
        for watch in watches:
            watch.cancel()


def serves(stubs: Stubs) -> bool:
    try:
        return bool(stubs.health.Check(health_pb2.HealthCheckRequest()).status)
    except grpc.RpcError:
        return False


def test_a_message_that_is_none_is_an_invalid_argument(daemon: GrpcDaemon, stubs: Stubs) -> None:
    call = stubs.channel.unary_unary("/edge_runtime.v1.Inference/Tokenize")
    for raw in (b"\xff", b"\x0a\x01\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x05ab"):
        status, message, metadata = failed(lambda raw=raw: call(raw))  # type: ignore[misc]
        assert status is grpc.StatusCode.INVALID_ARGUMENT, message
        assert metadata["edgert-code"] == "invalid_request" and "TokenizeRequest" in message
    assert call(b"")  # all defaults: an empty text


def test_a_field_that_is_not_known_is_refused(stubs: Stubs) -> None:
    extra = b"\xf8\x07\x01"  # field 127
    call = stubs.channel.unary_stream("/edge_runtime.v1.Inference/Generate")
    inside = (
        inference_pb2.GenerateRequest(text=PROMPT, max_tokens=1).SerializeToString() + b"\x22\x03" + extra
    )
    for raw in (LONG.SerializeToString() + extra, inside):
        status, message, _ = failed(lambda raw=raw: list(call(raw)))  # type: ignore[misc]
        assert status is grpc.StatusCode.INVALID_ARGUMENT and "127" in message


def test_a_message_of_countless_parts_is_refused_quickly(stubs: Stubs) -> None:
    call = stubs.channel.unary_stream("/edge_runtime.v1.Inference/Chat")
    began = time.monotonic()
    status, message, _ = failed(lambda: list(call(b"\x12\x00" * 1_000_000)))
    assert status is grpc.StatusCode.INVALID_ARGUMENT and "1000000" in message
    assert time.monotonic() - began < 5


def test_a_message_fits_whatever_it_quotes(stubs: Stubs) -> None:
    for name in ("n" * 100_000, "ü" * 100_000, "\0\r\n" * 10_000):
        status, message, metadata = failed(
            lambda name=name: stubs.models.Load(models_pb2.LoadModelRequest(name=name))  # type: ignore[misc]
        )
        assert status is grpc.StatusCode.NOT_FOUND and metadata["edgert-code"] == "model_not_found"
        assert len(message.encode()) <= MAX_MESSAGE_BYTES + 3


def test_nothing_internal_gets_out(
    daemon: GrpcDaemon, stubs: Stubs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class HiddenError(EdgeRuntimeError):
        """One that the catalogue does not have."""

    for error in (RuntimeError("secret of the house"), HiddenError("secret of the house")):

        async def broken(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(daemon.service, "tokenize", broken)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "edgert.grpc"):
            status, message, metadata = failed(
                lambda: stubs.inference.Tokenize(inference_pb2.TokenizeRequest(text="words of the user"))
            )
        assert (status, message) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
        assert metadata == {"edgert-code": "internal"}
        assert "secret of the house" in caplog.text and "words of the user" not in caplog.text


def test_a_cancellation_inside_the_daemon_is_answered(
    daemon: GrpcDaemon, stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    async def given_up(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(daemon.service, "tokenize", given_up)
    status, _, metadata = failed(
        lambda: stubs.inference.Tokenize(inference_pb2.TokenizeRequest(), timeout=10)
    )
    assert (status, metadata["edgert-code"]) == (grpc.StatusCode.UNAVAILABLE, "unavailable")
