"""The Cluster service of one device: joining, describing, measuring; work for others is handed on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_runtime import __version__
from edge_runtime.addresses import join_address, split_address
from edge_runtime.cluster import control_checks as checks
from edge_runtime.cluster.authority import ClusterAuthority, public_key_of
from edge_runtime.cluster.control_gate import Caller, ControlGate, current_caller
from edge_runtime.cluster.identity import Identity
from edge_runtime.cluster.members import Members
from edge_runtime.errors import ConfigError, DeadlineError, ForbiddenError, OverloadedError, RequestError
from edge_runtime.grpc_guard import STALL_SECONDS
from edge_runtime.private_authority import pem_of_certificate
from edge_runtime.v1 import cluster_pb2 as wire
from edge_runtime.v1 import cluster_pb2_grpc

MAX_CALLS = 256
MEASURE_SECONDS = 30.0  # longest stream of measurements
_MEASURES_AT_ONCE = 8
_STREAMS_A_CONNECTION = 128
_WILDCARDS = ("", "0.0.0.0", "::")

_log = logging.getLogger("edgert.cluster")


class WorkerService(Protocol):
    """Work for other members. Requests were checked field by field; errors become the caller's."""

    def prepare(self, caller: Caller, request: wire.PrepareRequest) -> AsyncIterator[wire.PrepareProgress]:
        """Fetch and load neuron groups; the last message says that they are ready."""

    async def prepare_adapters(
        self, caller: Caller, requests: AsyncIterator[wire.PrepareAdaptersRequest]
    ) -> wire.PrepareAdaptersResponse:
        """Load the side paths of a version of the adapters."""

    def fetch_shard(self, caller: Caller, request: wire.FetchShardRequest) -> AsyncIterator[wire.ShardChunk]:
        """A shard's bytes."""

    async def open_session(
        self, caller: Caller, request: wire.OpenSessionRequest
    ) -> wire.OpenSessionResponse:
        """Agree on a key; the caller's datagrams come from its host."""

    async def close_session(
        self, caller: Caller, request: wire.CloseSessionRequest
    ) -> wire.CloseSessionResponse:
        """End a session of this caller."""

    def compute(
        self, caller: Caller, requests: AsyncIterator[wire.ComputeRequest]
    ) -> AsyncIterator[wire.ComputeResponse]:
        """Contributions, for as long as the stream lasts."""


@dataclass(frozen=True, slots=True)
class WorkedModel:
    """What this device holds of a model for others; the fields are the message's."""

    model: str
    groups: int
    head_slices: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """What this device tells others of itself.

    Attributes:
        memory_bytes: of weights that it lends; 0: none.
        threads: that it lends.
        temperature: degrees Celsius of the processor; None where the device does not tell.
        battery: percent of charge; None where it runs on mains.
        models: that it works on for others now.
    """

    memory_bytes: int = 0
    threads: int = 0
    temperature: float | None = None
    battery: float | None = None
    models: Sequence[WorkedModel] = ()


class ControlServer:
    """The Cluster service on one address. Make and use it on one event loop.

    Args:
        identity: this device's.
        members: the table.
        worker: does the work for others.
        address: HOST:PORT to listen at; port 0 for any free one.
        describe: what to tell others; called with each Describe, so it should be quick.
        measure_compute: bytes of weights per second that a share of this shape gets; one at a time.
        authority: on the founder; without it nobody can join here.
        ask_founder: brings the table up to date, for callers that are not in it yet.
        changed: called (on the event loop) after somebody joined or left.
        heard: called (on the event loop) with the name of a member that described itself.
        stall_seconds: a stream's client that takes nothing for so long is given up.

    Attributes:
        port: that it listens at, real once `start` has returned.
    """

    def __init__(
        self,
        identity: Identity,
        members: Members,
        worker: WorkerService,
        *,
        address: str,
        describe: Callable[[], DeviceDescription],
        measure_compute: Callable[[wire.ComputeProbe], Awaitable[float]],
        authority: ClusterAuthority | None = None,
        ask_founder: Callable[[], Awaitable[object]] | None = None,
        changed: Callable[[], None] | None = None,
        heard: Callable[[str], None] | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.port = 0
        self._address = address
        self._identity = identity
        self._gate = ControlGate(members, ask_founder=ask_founder, stall_seconds=stall_seconds)
        self._server = grpc.aio.server(
            interceptors=(self._gate,), options=_options(), maximum_concurrent_rpcs=MAX_CALLS
        )
        servicer = _ClusterServicer(
            identity,
            members,
            worker,
            describe,
            measure_compute,
            authority,
            changed or (lambda: None),
            heard or (lambda name: None),
        )
        cluster_pb2_grpc.add_ClusterServicer_to_server(servicer, self._server)
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        try:
            self.port = self._server.add_secure_port(self._address, self._identity.server_credentials())
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen for the cluster at {self._address!r}; is the port in use, or the address "
                "another device's? Choose another one, or port 0 for any"
            ) from error
        await self._server.start()
        self._watch = asyncio.create_task(self._gate.watch(), name="cluster members watch")
        return self.port

    async def stop(self, seconds: float = 1.0) -> None:
        """Take nothing new, let what runs end for so long, cancel the rest."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._server.stop(seconds)


class _ClusterServicer(cluster_pb2_grpc.ClusterServicer):
    def __init__(
        self,
        identity: Identity,
        members: Members,
        worker: WorkerService,
        describe: Callable[[], DeviceDescription],
        measure_compute: Callable[[wire.ComputeProbe], Awaitable[float]],
        authority: ClusterAuthority | None,
        changed: Callable[[], None],
        heard: Callable[[str], None],
    ) -> None:
        self._identity = identity
        self._members = members
        self._worker = worker
        self._describe = describe
        self._measure_compute = measure_compute
        self._authority = authority
        self._changed = changed
        self._heard = heard
        self._probing = asyncio.Lock()
        self._measuring = 0

    async def Join(self, request: wire.JoinRequest, context: Any) -> wire.JoinResponse:  # noqa: N802
        if self._authority is None:
            founder = await asyncio.to_thread(self._members.founder)
            raise ForbiddenError(
                "this device cannot take others in; ask the founder of the cluster"
                + (f", {founder.name} at {founder.address}" if founder else "")
            )
        caller = current_caller()
        key = public_key_of(request.signing_request)
        checks.check_join_address(request.address)
        name = await asyncio.to_thread(
            self._members.accept,
            caller.name,
            request.name,
            _seen_from_here(request.address, caller.host),
            key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        )
        certificate = self._authority.sign_member(key, name)
        _log.info("%s joined the cluster from %s", name, caller.host)
        self._changed()
        return wire.JoinResponse(
            certificate=pem_of_certificate(certificate),
            authority=self._identity.authority,
            name=name,
            members=await self._known(),
        )

    async def Leave(self, request: wire.LeaveRequest, context: Any) -> wire.LeaveResponse:  # noqa: N802
        name = current_caller().name
        await asyncio.to_thread(self._members.revoke, name)
        _log.info("%s left the cluster", name)
        self._changed()
        return wire.LeaveResponse()

    async def Describe(self, request: wire.DescribeRequest, context: Any) -> wire.DescribeResponse:  # noqa: N802
        caller, told = current_caller(), request.caller
        if request.HasField("caller"):
            if told.name != caller.name:
                raise RequestError(
                    f"the caller is {caller.name} by its certificate and cannot be another one"
                )
            checks.check_join_address(told.address)
            address = _seen_from_here(told.address, caller.host)
            await asyncio.to_thread(self._members.seen, caller.name, address)
        else:
            await asyncio.to_thread(self._members.seen, caller.name)
        self._heard(caller.name)
        own = self._describe()
        me, *others = await self._known()
        response = wire.DescribeResponse(
            version=__version__,
            memory_bytes=own.memory_bytes,
            threads=own.threads,
            temperature=own.temperature or 0.0,
            battery=100.0 if own.battery is None else own.battery,
            members=others,
            machine=platform.machine(),
            models=[
                wire.WorkedModel(
                    model=held.model, groups=held.groups, head_slices=held.head_slices, bytes=held.nbytes
                )
                for held in own.models
            ],
        )
        response.self.CopyFrom(me)
        return response

    async def Measure(  # noqa: N802
        self, requests: AsyncIterator[wire.MeasureRequest], context: Any
    ) -> AsyncIterator[wire.MeasureResponse]:
        if self._measuring >= _MEASURES_AT_ONCE:
            raise OverloadedError(f"{self._measuring} measurements run here; try again", 1.0)
        self._measuring += 1
        try:
            end = asyncio.get_running_loop().time() + MEASURE_SECONDS
            source = aiter(requests)
            while True:
                try:
                    async with asyncio.timeout_at(end):
                        request = await anext(source)
                        response = await self._measured(request)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineError(f"measurements end after {MEASURE_SECONDS:g} s") from None
                yield response
        finally:
            self._measuring -= 1

    async def _measured(self, request: wire.MeasureRequest) -> wire.MeasureResponse:
        match request.WhichOneof("kind"):
            case "echo":
                checks.check_echo(request.echo)
                return wire.MeasureResponse(echo=request.echo)
            case "compute":
                checks.check_probe(request.compute)
                async with self._probing:
                    return wire.MeasureResponse(bytes_per_second=await self._measure_compute(request.compute))
        raise RequestError("a measurement asks for an echo or for the speed of computing")

    def Prepare(  # noqa: N802
        self, request: wire.PrepareRequest, context: Any
    ) -> AsyncIterator[wire.PrepareProgress]:
        checks.check_prepare(request)
        return self._worker.prepare(current_caller(), request)

    async def PrepareAdapters(  # noqa: N802
        self, requests: AsyncIterator[wire.PrepareAdaptersRequest], context: Any
    ) -> wire.PrepareAdaptersResponse:
        return await self._worker.prepare_adapters(current_caller(), checks.checked_adapters(requests))

    def FetchShard(  # noqa: N802
        self, request: wire.FetchShardRequest, context: Any
    ) -> AsyncIterator[wire.ShardChunk]:
        checks.check_fetch(request)
        return self._worker.fetch_shard(current_caller(), request)

    async def OpenSession(  # noqa: N802
        self, request: wire.OpenSessionRequest, context: Any
    ) -> wire.OpenSessionResponse:
        checks.check_open(request)
        return await self._worker.open_session(current_caller(), request)

    async def CloseSession(  # noqa: N802
        self, request: wire.CloseSessionRequest, context: Any
    ) -> wire.CloseSessionResponse:
        return await self._worker.close_session(current_caller(), request)

    def Compute(  # noqa: N802
        self, requests: AsyncIterator[wire.ComputeRequest], context: Any
    ) -> AsyncIterator[wire.ComputeResponse]:
        return self._worker.compute(current_caller(), checks.checked_compute(requests))

    async def _known(self) -> list[wire.Member]:
        """Members, this device first."""
        found = {member.name: member.address for member in await asyncio.to_thread(self._members.active)}
        own = wire.Member(name=self._identity.name, address=found.pop(self._identity.name, ""))
        return [own, *(wire.Member(name=name, address=address) for name, address in found.items())]


def _seen_from_here(address: str, host: str) -> str:
    """An address with the caller's own host where it says none, or all."""
    if address.startswith(":"):
        return join_address(host, int(address[1:]))
    told, port = split_address(address)
    return join_address(host, port) if told in _WILDCARDS else address


def _options() -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", checks.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", checks.MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", _STREAMS_A_CONNECTION),
        # Otherwise a second daemon could listen at the same port, and calls would go to either.
        ("grpc.so_reuseport", 0),
        # A member whose network went away without a word is found out within 40 s, and its calls end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 3),
    ]
