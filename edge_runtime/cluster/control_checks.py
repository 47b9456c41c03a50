"""What the fields of the Cluster service's requests may hold; whatever a peer sends is looked at here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from edge_runtime.cluster.members import MAX_ADDRESS, check_address
from edge_runtime.errors import RequestError
from edge_runtime.v1 import cluster_pb2 as wire

MAX_MESSAGE_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 12 << 20
MAX_LAYERS = 1 << 10
MAX_GROUPS = 1 << 16  # of a layer
MAX_HEAD_SLICES = 1 << 16
MAX_SOURCES = 64
MAX_ROWS = 512  # tokens of one prefill batch
MAX_SHARD_BYTES = 1 << 40
MAX_ECHO_BYTES = 1 << 20
MAX_PROBE_WIDTH = 1 << 16
MAX_PROBE_NEURONS = 1 << 16
MAX_PROBE_PRODUCT = 1 << 26  # weights of one of the three matrices
MAX_TYPE = 255
DIGEST_BYTES = 32
SECRET_BYTES = 32
_MODEL = re.compile(r"[0-9a-f]{64}")


def check_prepare(request: wire.PrepareRequest) -> None:
    """Refuse what cannot be a wish for neuron groups.

    Raises:
        RequestError: a field is out of range.
    """
    _within("manifest bytes", len(request.manifest), 1, MAX_MANIFEST_BYTES)
    _within("layers", len(request.layers), 0, MAX_LAYERS)
    for number, layer in enumerate(request.layers):
        _distinct(f"groups of layer {number}", layer.groups, MAX_GROUPS)
    _distinct("head_slices", request.head_slices, MAX_HEAD_SLICES)
    _within("sources", len(request.sources), 0, MAX_SOURCES)
    for source in request.sources:
        check_address(source)


def check_fetch(request: wire.FetchShardRequest) -> None:
    """Refuse what cannot name a shard.

    Raises:
        RequestError: a field is out of range.
    """
    _within("digest bytes", len(request.digest), DIGEST_BYTES, DIGEST_BYTES)
    _within("offset", request.offset, 0, MAX_SHARD_BYTES)


def check_open(request: wire.OpenSessionRequest) -> None:
    """Refuse what cannot open a session.

    Raises:
        RequestError: a field is out of range.
    """
    _check_model(request.model)
    _within("secret bytes", len(request.secret), SECRET_BYTES, SECRET_BYTES)


async def checked_adapters(requests: AsyncIterator[Any]) -> AsyncIterator[wire.PrepareAdaptersRequest]:
    """The messages of a call, each checked; whether the matrices fit, the worker knows.

    Raises:
        RequestError: a field is out of range.
    """
    async for request in requests:
        _check_model(request.model)
        _within("version", request.version, 1, (1 << 32) - 1)
        for part in request.parts:
            _within("layer", part.layer, 0, MAX_LAYERS)
        yield request


def check_compute(request: wire.ComputeRequest) -> None:
    """Refuse what cannot ask for contributions; whether the inputs fit the model, the worker knows.

    Raises:
        RequestError: a field is out of range.
    """
    _within("layer", request.layer, 0, MAX_LAYERS)
    _within("n_rows", request.n_rows, 1, MAX_ROWS)
    _within("inputs bytes", len(request.inputs), 1, MAX_MESSAGE_BYTES)


async def checked_compute(requests: AsyncIterator[Any]) -> AsyncIterator[wire.ComputeRequest]:
    """The requests of a stream, each checked.

    Raises:
        RequestError: a field is out of range.
    """
    async for request in requests:
        check_compute(request)
        yield request


def check_probe(probe: wire.ComputeProbe) -> None:
    """Refuse a probe that would take long or much memory.

    Raises:
        RequestError: a field is out of range.
    """
    _within("n_embd", probe.n_embd, 1, MAX_PROBE_WIDTH)
    _within("neurons", probe.neurons, 1, MAX_PROBE_NEURONS)
    _within("n_embd times neurons", probe.n_embd * probe.neurons, 1, MAX_PROBE_PRODUCT)
    _within("gate_type", probe.gate_type, 0, MAX_TYPE)
    _within("down_type", probe.down_type, 0, MAX_TYPE)


def check_echo(content: bytes) -> None:
    """Refuse an echo that is too long.

    Raises:
        RequestError: it is.
    """
    _within("echo bytes", len(content), 0, MAX_ECHO_BYTES)


def check_join_address(address: str) -> None:
    """Refuse what is neither ``HOST:PORT`` nor ``:PORT``.

    Raises:
        RequestError: it is not.
    """
    if not 0 < len(address) <= MAX_ADDRESS:
        raise RequestError(f"the address has {len(address)} characters; needed are 1 to {MAX_ADDRESS}")
    check_address(f"0.0.0.0{address}" if address.startswith(":") else address)


def _check_model(model: str) -> None:
    if not _MODEL.fullmatch(model):
        raise RequestError("model must be the SHA-256 of a manifest, 64 digits in hexadecimal")


def _within(name: str, found: int, least: int, most: int) -> None:
    if not least <= found <= most:
        raise RequestError(f"{name}: {found}; possible are {least} to {most}")


def _distinct(name: str, found: Any, most: int) -> None:
    _within(name, len(found), 0, most)
    if len(set(found)) != len(found):
        raise RequestError(f"{name}: one appears twice")
    if found and max(found) >= most:
        raise RequestError(f"{name}: {max(found)}; possible are 0 to {most - 1}")
