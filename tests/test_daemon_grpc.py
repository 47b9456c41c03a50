"""The gRPC API seen from the wire: messages, statuses, metadata, health, reflection, limits, the end."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_fixture import RAMBLING, GrpcDaemon, config_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from program import REPOSITORY

from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.grpc_boundary import METHOD_SCOPES
from edge_runtime.daemon.grpc_server import SERVICES
from edge_runtime.error_catalog import INTERNAL_MESSAGE
from edge_runtime.errors import ConfigError, EdgeRuntimeError
from edge_runtime.grpc_guard import MAX_MESSAGE_BYTES
from edge_runtime.v1 import (
    daemon_pb2,
    daemon_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

PROMPT = "The home of Paul Colton is in"
LONG = inference_pb2.GenerateRequest(text=PROMPT, sampling=inference_pb2.Sampling(**RAMBLING))
GREEDY = inference_pb2.Sampling(temperature=0)


class Stubs:
    """All stubs of one channel."""

    def __init__(self, address: str, *options: tuple[str, Any]) -> None:
        self.channel = grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1), *options))
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)
        self.daemon = daemon_pb2_grpc.DaemonStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(self.channel)

    def __enter__(self) -> Stubs:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def stubs(daemon: GrpcDaemon) -> Iterator[Stubs]:
    with Stubs(daemon.address) as made:
        yield made


def failed(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, message and trailing metadata of a call that fails."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code(), error.details(), dict(error.trailing_metadata())


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def idle(daemon: GrpcDaemon) -> bool:
    return not daemon.call(daemon.service.status).requests


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
                sole_field = re.match(r"(repeated )?(Model|LoadedModel|Embedding)s? ?\w* ", stripped)
                assert before.startswith("//") or sole_field, f"{path.name}: nothing explains {stripped}"
                found += 1
            if stripped:
                before = stripped
    assert found > 100


def test_methods_have_their_scopes() -> None:
    modules = (inference_pb2, models_pb2, daemon_pb2)
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


# --- who may call -----------------------------------------------------------------------------


def test_tokens_are_asked_for_and_checked(tmp_path: Path) -> None:
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        user = daemon.token("user", Scope.INFER)

        def status(*metadata: tuple[str, str | bytes]) -> str:
            try:
                stubs.daemon.GetStatus(daemon_pb2.GetStatusRequest(), metadata=metadata)
            except grpc.RpcError as error:
                return str(error.code().name)  # type: ignore[attr-defined]
            return "OK"

        assert status() == "UNAUTHENTICATED"
        assert status(("authorization", f"Bearer {user}")) == "OK"
        assert status(("authorization", f"bearer  {user} ")) == "OK"
        for wrong in (
            user,
            f"Basic {user}",
            "Bearer",
            f"Bearer {user}x",
            f"Bearer {user[:-1]}",
            "Bearer " + "x" * 5000,
        ):
            assert status(("authorization", wrong)) == "UNAUTHENTICATED", wrong
        assert status(*bearer(user), *bearer(user)) == "INVALID_ARGUMENT"
        code, message, metadata = failed(
            lambda: stubs.daemon.Shutdown(daemon_pb2.ShutdownRequest(), metadata=bearer(user))
        )
        assert (code, metadata["edgert-code"]) == (grpc.StatusCode.PERMISSION_DENIED, "permission_denied")
        assert user not in message
        assert daemon.shutdowns == 0
        daemon.tokens.revoke("user")
        daemon.gate.reload()
        assert status(*bearer(user)) == "UNAUTHENTICATED"
        found = [status(*bearer("edgert_guess")) for _ in range(12)]
        assert found[-1] == "RESOURCE_EXHAUSTED"
        again = daemon.token("user", Scope.INFER)
        assert status(*bearer(again)) == "OK"  # right ones are let in all the same


def test_a_token_is_asked_for_before_the_message_is_looked_at(tmp_path: Path) -> None:
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        for method in METHOD_SCOPES:
            if METHOD_SCOPES[method] is not None:
                call = stubs.channel.stream_stream(method)
                status, _, _ = failed(lambda call=call: list(call(iter([b"\xff"]))))  # type: ignore[misc]
                assert status is grpc.StatusCode.UNAUTHENTICATED, method


# --- health and reflection --------------------------------------------------------------------


def test_health_needs_no_token_and_knows_each_service(tmp_path: Path) -> None:
    states = health_pb2.HealthCheckResponse
    with (
        GrpcDaemon(tmp_path, config_of(server={"require_token": True})) as daemon,
        Stubs(daemon.address) as stubs,
    ):
        for name in ("", *SERVICES, "grpc.health.v1.Health"):
            assert stubs.health.Check(health_pb2.HealthCheckRequest(service=name)).status == states.SERVING
        status, _, _ = failed(lambda: stubs.health.Check(health_pb2.HealthCheckRequest(service="absent")))
        assert status is grpc.StatusCode.NOT_FOUND
        unknown = stubs.health.Watch(health_pb2.HealthCheckRequest(service="absent"))
        assert next(unknown).status == states.SERVICE_UNKNOWN
        unknown.cancel()
        watches = [stubs.health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0])) for _ in range(2)]
        assert [next(watch).status for watch in watches] == [states.SERVING] * 2
        watches[0].cancel()
        daemon.call(daemon.server.announce_stop)
        assert stubs.health.Check(health_pb2.HealthCheckRequest()).status == states.NOT_SERVING
        assert [message.status for message in watches[1]] == [states.NOT_SERVING]


def test_reflection_tells_services_and_files_to_those_who_may_call(tmp_path: Path) -> None:
    config = config_of(server={"require_token": True})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="edge_runtime.v1.Inference"),
        ]
        status, _, _ = failed(lambda: list(stubs.reflection.ServerReflectionInfo(iter(asked))))
        assert status is grpc.StatusCode.UNAUTHENTICATED
        metadata = bearer(daemon.token("user", Scope.INFER))
        listed, file = stubs.reflection.ServerReflectionInfo(iter(asked), metadata=metadata)
        names = {service.name for service in listed.list_services_response.service}
        assert names >= {*SERVICES, "grpc.health.v1.Health"}
        assert b"GenerateRequest" in file.file_descriptor_response.file_descriptor_proto[0]
        raw = stubs.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        status, _, _ = failed(lambda: list(raw(iter([b"\xff"]), metadata=metadata)))
        assert status is grpc.StatusCode.INVALID_ARGUMENT


# --- clients that go away ---------------------------------------------------------------------


def test_a_cancelled_call_frees_its_place_and_its_task(daemon: GrpcDaemon, stubs: Stubs) -> None:
    tasks, ended = daemon.tasks(), daemon.finished("cancelled")
    for _ in range(5):
        call = stubs.inference.Generate(LONG)
        next(call)
        call.cancel()
    wait_until(lambda: daemon.finished("cancelled") == ended + 5, "the requests have ended")
    wait_until(lambda: daemon.tasks() <= tasks, "nothing is left of the calls")


def test_a_client_that_is_killed_frees_its_place(daemon: GrpcDaemon) -> None:
    program = (
        "import sys, time; from edge_runtime.client import Client; "
        f"s = Client(sys.argv[1]).generate({PROMPT!r}, **{dict(RAMBLING)!r}); "
        "next(s); print('runs', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, daemon.address], stdout=subprocess.PIPE)
    assert process.stdout is not None
    ended = daemon.finished("cancelled")
    with process:
        assert process.stdout.readline() == b"runs\n"
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: daemon.finished("cancelled") == ended + 1, "the request has gone")


def test_a_deadline_ends_a_request_in_the_queue_as_well(tmp_path: Path) -> None:
    with GrpcDaemon(tmp_path, config_of(model={"sequences": 1})) as daemon, Stubs(daemon.address) as stubs:
        running = stubs.inference.Generate(LONG)
        next(running)
        waiting = stubs.inference.Generate(LONG, timeout=0.2)
        next(waiting)
        status, _, _ = failed(lambda: list(waiting))
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: len(daemon.call(daemon.service.status).requests) <= 1, "it left the queue")
        running.cancel()


def test_a_client_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
    request = inference_pb2.GenerateRequest(text=PROMPT, logprobs=20, sampling=LONG.sampling)
    with GrpcDaemon(tmp_path, stall_seconds=0.05) as daemon, Stubs(daemon.address, *small_window) as stubs:
        stalled = stubs.inference.Generate(request)
        next(stalled)
        wait_until(lambda: idle(daemon), "its request has gone", 30)
        assert daemon.call(daemon.service.status).finished == {"cancelled": 1}
        status, _, metadata = failed(lambda: list(stalled))
        assert (status.name, metadata["edgert-code"]) == ("DEADLINE_EXCEEDED", "deadline_exceeded")


# --- the port, and the end --------------------------------------------------------------------


def test_a_port_in_use_is_an_error(daemon: GrpcDaemon, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.grpc"):
        GrpcDaemon(tmp_path, config_of(model={"preload": False}), address=daemon.address)
    with pytest.raises(ConfigError, match=r"server\.grpc"):
        GrpcDaemon(tmp_path, config_of(model={"preload": False}), address="192.0.2.1:0")


def test_a_large_message_is_refused_by_the_setting(tmp_path: Path) -> None:
    config = config_of(server={"max_body_bytes": 10_000})
    with GrpcDaemon(tmp_path, config) as daemon, Stubs(daemon.address) as stubs:
        request = inference_pb2.TokenizeRequest(text="a" * 9_900)
        assert stubs.inference.Tokenize(request).tokens
        request.text += "a" * 200
        status, _, _ = failed(lambda: stubs.inference.Tokenize(request))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stopping_ends_watches_at_once_and_running_answers_within_the_limit(tmp_path: Path) -> None:
    daemon = GrpcDaemon(tmp_path)
    with Stubs(daemon.address) as stubs:
        watch = stubs.health.Watch(health_pb2.HealthCheckRequest())
        next(watch)
        short = stubs.inference.Generate(
            inference_pb2.GenerateRequest(text=PROMPT, max_tokens=30, sampling=LONG.sampling)
        )
        next(short)
        began = time.monotonic()
        daemon.stop(10.0)
        assert time.monotonic() - began < 5
        assert list(short)[-1].finished.generated_tokens == 30
        assert [message.status for message in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        status, _, _ = failed(lambda: stubs.daemon.GetStatus(daemon_pb2.GetStatusRequest()))
        assert status is grpc.StatusCode.UNAVAILABLE
