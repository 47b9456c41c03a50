"""docs/api.md: it is what the code says, and its generator overlooks nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from program import REPOSITORY

from edge_runtime import client
from edge_runtime.v1 import daemon_pb2, inference_pb2, models_pb2, personalization_pb2

PROTOS = (inference_pb2, models_pb2, personalization_pb2, daemon_pb2)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    return importlib.import_module("write_api_reference")


@pytest.fixture
def proto_text(generator: ModuleType) -> ModuleType:
    return importlib.import_module("api_reference.proto_text")


def test_the_api_reference_is_what_the_code_says(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.reference(), "run `make reference`"


def test_every_method_and_every_class_of_the_client_is_in_it(generator: ModuleType) -> None:
    page = generator.PAGE.read_text()
    for name in client.__all__:
        assert f"# {name}\n" in page
    for kind in (client.Client, client.Models, client.Stream, client.Edits, client.EditStream):
        for method in vars(kind):
            assert method.startswith("_") or f"#### {kind.__name__}.{method}\n" in page


@pytest.mark.parametrize("module", PROTOS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_reader_of_protos_sees_what_their_compiler_saw(
    module: ModuleType, proto_text: ModuleType
) -> None:
    descriptor = module.DESCRIPTOR
    read = proto_text.read(REPOSITORY / "proto" / descriptor.name)
    found = {block.name: [member.name for member in block.members] for block in read.blocks}
    wanted = {}
    for service in descriptor.services_by_name.values():
        wanted[service.name] = [method.name for method in service.methods]
    for enum in descriptor.enum_types_by_name.values():
        wanted[enum.name] = [value.name for value in enum.values]
    messages = list(descriptor.message_types_by_name.values())
    while messages:
        message = messages.pop()
        wanted[message.full_name.removeprefix(f"{descriptor.package}.")] = [
            one.name for one in message.fields
        ]
        messages += [one for one in message.nested_types if not one.GetOptions().map_entry]
    assert found == wanted


def test_every_method_and_field_of_a_proto_has_a_comment(proto_text: ModuleType) -> None:
    for module in PROTOS:
        for block in proto_text.read(REPOSITORY / "proto" / module.DESCRIPTOR.name).blocks:
            # A message that is nothing but another one is explained by its name.
            wrapper = block.kind == "message" and len(block.members) == 1
            for member in block.members:
                assert member.comment or wrapper, f"{block.name}.{member.name}"


def test_a_proto_that_is_not_understood_is_refused(proto_text: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "some.proto"
    path.write_text('syntax = "proto3";\n\nmessage A {\n  // It.\n  string b = 1 [deprecated = true];\n}\n')
    with pytest.raises(ValueError, match="line 5"):
        proto_text.read(path)
