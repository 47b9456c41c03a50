"""Anything at all sent to the gRPC API gets a typed answer, and the daemon goes on."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_fixture import GrpcDaemon, config_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.daemon.grpc_boundary import METHOD_SCOPES
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.v1 import inference_pb2, models_pb2, personalization_pb2

# Shutdown ends the daemon, and Prepare computes for a minute and writes beside the model.
METHODS = sorted(
    name
    for name in METHOD_SCOPES
    if name.startswith("/edge_runtime.") and not name.endswith(("/Shutdown", "/Prepare"))
)
CODES = {kind.code for kind in [EdgeRuntimeError, *EdgeRuntimeError.__subclasses__()]} | {
    "unsupported_model",
    "context_overflow",
    "chat_template",
}
EXAMPLES = settings(max_examples=150, deadline=None)

text = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["demo", "absent", "", "\0", "../demo", "/etc/passwd", "demo.gguf", "a" * 5000, "\U0001f600" * 99]
    ),
)
int32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), -1, 0, 1, 2, 21, 2**31 - 1]))
double = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e308]))
uint64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**63, 2**64 - 1]))
tokens = st.lists(st.one_of(int32, st.integers(0, 600)), max_size=40)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


sampling = st.builds(
    inference_pb2.Sampling,
    temperature=optional(double),
    top_k=optional(int32),
    top_p=optional(double),
    min_p=optional(double),
    repetition_penalty=optional(double),
    frequency_penalty=optional(double),
    presence_penalty=optional(double),
    penalty_window=optional(int32),
    seed=optional(uint64),
)
sound_sampling = st.builds(
    inference_pb2.Sampling,
    temperature=optional(st.floats(0, 100)),
    top_k=optional(st.integers(0, 2**31 - 1)),
    top_p=optional(st.floats(0, 1, exclude_min=True)),
    min_p=optional(st.floats(0, 1)),
    repetition_penalty=optional(st.floats(0.01, 10)),
    frequency_penalty=optional(st.floats(-2, 2)),
    presence_penalty=optional(st.floats(-2, 2)),
    penalty_window=optional(st.integers(-1, 2**31 - 1)),
    seed=optional(uint64),
)
common: dict[str, st.SearchStrategy[Any]] = {
    "model": st.one_of(st.just(""), text),
    "sampling": optional(st.one_of(sampling, sound_sampling)),
    "max_tokens": st.one_of(st.integers(1, 4), int32),
    "stop": st.lists(text, max_size=3),
    "logprobs": optional(int32),
    "mode": st.one_of(st.integers(0, 2), int32),
    "quality": optional(double),
}
token_ids = st.builds(inference_pb2.TokenIds, ids=tokens)
turn = st.builds(
    inference_pb2.ChatMessage,
    role=st.one_of(st.sampled_from(["user", "assistant", "system"]), text),
    content=text,
)
piece = st.binary(max_size=50)
edit_limits: dict[str, st.SearchStrategy[Any]] = {
    "model": st.one_of(st.just(""), text),
    "name": optional(text),
    "force": st.booleans(),
    "steps": optional(int32),
    "seconds": optional(double),
}
edit_name = st.one_of(st.sampled_from(["1", "edit-1", "-1", "9" * 40]), text)
named_edits = {
    f"Personalization/{name}": st.builds(getattr(personalization_pb2, f"{name}Request"), name=edit_name)
    for name in ("Follow", "Cancel", "Show", "Revert", "Reapply")
}
REQUESTS: dict[str, st.SearchStrategy[Any]] = {
    "Personalization/Remove": st.builds(personalization_pb2.RemoveEditRequest, name=edit_name),
    "Inference/Generate": st.one_of(
        st.builds(inference_pb2.GenerateRequest, text=text, **common),
        st.builds(inference_pb2.GenerateRequest, tokens=token_ids, **common),
        st.builds(inference_pb2.GenerateRequest, **common),
    ),
    "Inference/Chat": st.builds(inference_pb2.ChatRequest, messages=st.lists(turn, max_size=4), **common),
    "Inference/Tokenize": st.builds(
        inference_pb2.TokenizeRequest,
        model=st.one_of(st.just(""), text),
        text=text,
        add_bos=optional(st.booleans()),
        parse_special=optional(st.booleans()),
    ),
    "Inference/Detokenize": st.builds(
        inference_pb2.DetokenizeRequest, model=st.one_of(st.just(""), text), tokens=tokens
    ),
    "Inference/Embed": st.builds(
        inference_pb2.EmbedRequest,
        model=st.one_of(st.just(""), text),
        inputs=st.lists(
            st.one_of(
                st.builds(inference_pb2.EmbedInput, text=text),
                st.builds(inference_pb2.EmbedInput, tokens=token_ids),
                st.just(inference_pb2.EmbedInput()),
            ),
            max_size=3,
        ),
    ),
    **named_edits,
    "Personalization/Apply": st.builds(
        personalization_pb2.ApplyRequest,
        prompt=text,
        subject=text,
        target=text,
        paraphrases=st.lists(text, max_size=40),
        **edit_limits,
    ),
    "Personalization/Forget": st.builds(
        personalization_pb2.ForgetRequest,
        queries=st.lists(st.builds(personalization_pb2.ForgetQuery, prompt=text, subject=text), max_size=20),
        refusal=optional(text),
        **edit_limits,
    ),
    "Personalization/List": st.builds(personalization_pb2.ListEditsRequest, model=text),
    "Personalization/Evaluate": st.builds(
        personalization_pb2.EvaluateRequest,
        names=st.lists(edit_name, max_size=3),
        model=st.one_of(st.just(""), text),
    ),
    "Personalization/Export": st.builds(
        personalization_pb2.ExportRequest, names=st.lists(edit_name, max_size=3), format=int32
    ),
    "Personalization/Import": st.builds(
        personalization_pb2.ImportRequest,
        header=optional(
            st.builds(
                personalization_pb2.ImportHeader,
                name=edit_name,
                model=st.one_of(st.just(""), text),
                format=st.one_of(st.integers(0, 2), int32),
            )
        ),
        file=st.one_of(st.sampled_from(["adapter.gguf", "adapter_config.json"]), text),
        content=piece,
    ),
    "Models/Describe": st.builds(models_pb2.DescribeModelRequest, name=text),
    "Models/Load": st.builds(models_pb2.LoadModelRequest, name=text),
    "Models/Unload": st.builds(models_pb2.UnloadModelRequest, name=text),
    "Models/Remove": st.builds(models_pb2.RemoveModelRequest, name=text),
    "Models/Pull": st.builds(
        models_pb2.PullModelRequest,
        source=st.sampled_from(
            ["", "x", "hf:", "hf:a/b", "file:/etc/passwd", "ftp://x/y.gguf", "https://", "\0"]
        ),
        name=optional(text),
        sha256=optional(text),
        replace=st.booleans(),
    ),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcDaemon]:
    with GrpcDaemon(tmp_path_factory.mktemp("home"), config_of(model={"context": 128})) as running:
        yield running


@pytest.fixture(scope="module")
def channel(daemon: GrpcDaemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(daemon.address) as made:
        yield made


@pytest.fixture(scope="module")
def guarded_channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    """To a daemon that asks for a token."""
    config = config_of(server={"require_token": True}, model={"preload": False})
    with (
        GrpcDaemon(tmp_path_factory.mktemp("guarded"), config) as running,
        grpc.insecure_channel(running.address) as made,
    ):
        yield made


def outcome(channel: grpc.Channel, method: str, raw: bytes, metadata: Any = ()) -> str:
    """OK, or the status of the refusal; what is refused has a code and says nothing internal."""
    try:
        # Every method can be called like this: one message out, any number in.
        list(channel.unary_stream(method)(raw, timeout=30, metadata=metadata))
    except grpc.RpcError as error:
        found: Any = error
        status, message = str(found.code().name), str(found.details())
        assert status not in ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED", "UNIMPLEMENTED"), (
            message
        )
        assert dict(found.trailing_metadata()).get("edgert-code") in CODES
        for sign in ("Traceback", "Error(", "Exception", "object at 0x", ".py"):
            assert sign not in message
        return status
    return "OK"


def test_all_methods_are_covered() -> None:
    without_fields = {"Models/List", "Daemon/GetStatus"}
    assert {name.removeprefix("/edge_runtime.v1.") for name in METHODS} == set(REQUESTS) | without_fields


@EXAMPLES
@given(method=st.sampled_from(METHODS), raw=st.binary(max_size=200))
def test_random_bytes_get_a_typed_answer(
    daemon: GrpcDaemon, channel: grpc.Channel, method: str, raw: bytes
) -> None:
    assert outcome(channel, method, raw) in ("OK", "INVALID_ARGUMENT", "NOT_FOUND")


@settings(EXAMPLES, max_examples=400)
@given(choice=st.sampled_from(sorted(REQUESTS)), draw=st.data())
def test_random_values_get_a_typed_answer(
    daemon: GrpcDaemon, channel: grpc.Channel, choice: str, draw: st.DataObject
) -> None:
    message = draw.draw(REQUESTS[choice])
    outcome(channel, f"/edge_runtime.v1.{choice}", message.SerializeToString())


@EXAMPLES
@given(choice=st.sampled_from(sorted(REQUESTS)), draw=st.data())
def test_damaged_messages_get_a_typed_answer(
    daemon: GrpcDaemon, channel: grpc.Channel, choice: str, draw: st.DataObject
) -> None:
    raw = bytearray(draw.draw(REQUESTS[choice]).SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        if raw:
            raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
    outcome(channel, f"/edge_runtime.v1.{choice}", bytes(raw[: draw.draw(st.integers(0, len(raw)))]))


@EXAMPLES
@given(
    request=st.builds(
        inference_pb2.GenerateRequest,
        text=st.text(max_size=40),
        sampling=sound_sampling,
        mode=st.integers(0, 2),
        quality=optional(st.floats(0, 1, exclude_min=True)),
    )
)
def test_values_within_their_ranges_are_served(
    daemon: GrpcDaemon, channel: grpc.Channel, request: inference_pb2.GenerateRequest
) -> None:
    request.max_tokens = 3
    if request.text:
        assert outcome(channel, "/edge_runtime.v1.Inference/Generate", request.SerializeToString()) == "OK"


@EXAMPLES
@given(
    value=st.one_of(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300),
        st.sampled_from(["Bearer", "Bearer ", "bearer  ", "Bearer edgert_", "Bearer " + "x" * 4000]),
    )
)
def test_any_authorization_gets_a_typed_answer(guarded_channel: grpc.Channel, value: str) -> None:
    metadata = (("authorization", value),)
    found = outcome(guarded_channel, "/edge_runtime.v1.Models/List", b"", metadata)
    assert found in ("UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


@settings(EXAMPLES, max_examples=40)
@given(
    begin=st.sampled_from(
        [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"]
    ),
    rest=st.binary(max_size=400),
)
def test_bytes_that_are_no_grpc_harm_nobody(
    daemon: GrpcDaemon, channel: grpc.Channel, begin: bytes, rest: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", daemon.server.port), timeout=5) as connection:
        connection.sendall(begin + rest)
    assert outcome(channel, "/edge_runtime.v1.Daemon/GetStatus", b"") == "OK"


def test_afterwards_the_daemon_still_works_and_nothing_is_left(
    daemon: GrpcDaemon, channel: grpc.Channel
) -> None:
    request = inference_pb2.GenerateRequest(text="The home of Paul Colton is in", max_tokens=4)
    assert outcome(channel, "/edge_runtime.v1.Inference/Generate", request.SerializeToString()) == "OK"
    assert daemon.call(lambda: daemon.service.ready)
    assert daemon.call(daemon.service.status).requests == ()
