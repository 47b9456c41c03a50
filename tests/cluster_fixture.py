"""A model spread over nodes on loopback: a real engine, real shares, real sockets and streams."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from dataplane_fixture import HOST, PATIENCE, Floats

from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.coordinator import Coordinator
from edge_runtime.cluster.exchange import ADAPTERS_VERSION, Answer, Inputs, Link
from edge_runtime.cluster.grpc_link import GrpcLink
from edge_runtime.cluster.grpc_worker import MAX_MESSAGE_BYTES, serve_compute
from edge_runtime.cluster.held_shares import HeldShares
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.prefill import Prefill
from edge_runtime.cluster.prepared_adapters import PreparedAdapters
from edge_runtime.cluster.shard_fetch import ReadyShard
from edge_runtime.cluster.side_parts import SideParts, messages_for
from edge_runtime.cluster.udp_link import UdpLink
from edge_runtime.cluster.udp_worker import UdpWorker
from edge_runtime.engine.adapters import Adapters
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.group_slices import GroupSlices, PartitionShape
from edge_runtime.engine.kv_tensors import KVType
from edge_runtime.engine.shares import ShareComputer
from edge_runtime.v1 import cluster_pb2_grpc
from models.synthetic import SyntheticModel, write_synthetic_gguf
from scheduler.deadlines import Tails
from scheduler.plan import Plan

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
]
# Of F32, so that what other sums do to it stays in the last bits. Its head has three slices.
FLOATS = SyntheticModel(n_layers=4, n_embd=128, n_ff=416, n_head=4, n_head_kv=2, n_vocab=2100, n_ctx=1024)
MODEL = "0" * 64  # stands for the SHA-256 of a manifest
# What a node answers in place of a right contribution: (plan, layer, right sums). It may raise RefusedError.
Spoil = Callable[[int, int, Floats], Floats]


def plan_of(
    shape: PartitionShape,
    parts: Sequence[float],
    *,
    head: Sequence[int] = (),
    number: int = 1,
    replicas: bool = False,
    syncs: Sequence[int] = (),
    seed: int = 0,
) -> Plan:
    """A plan that nobody computed.

    Args:
        parts: of the neuron groups, for each node, the coordinator first; which ones is drawn by `seed`.
        head: slices of the head for each node; the coordinator has all where nothing is said.
        replicas: whether the coordinator holds everything.
    """
    random = np.random.default_rng(seed)
    bounds = np.round(np.cumsum([0.0, *parts]) / sum(parts) * shape.n_groups).astype(int)
    layers = []
    for _ in range(shape.n_layers):
        order = random.permutation(shape.n_groups)
        layers.append(tuple(tuple(sorted(order[a:b].tolist())) for a, b in pairwise(bounds)))
    counts = list(head) or [shape.n_head_slices, *[0] * (len(parts) - 1)]
    assert sum(counts) == shape.n_head_slices
    ends = np.cumsum([0, *counts])
    slices = tuple(tuple(range(a, b)) for a, b in pairwise(ends))
    remote = tuple(tuple(sorted(g for held in nodes[1:] for g in held)) for nodes in layers)
    return Plan(
        number=number,
        names=tuple(f"node {node}" for node in range(len(parts))),
        groups=tuple(layers),
        replicas=remote if replicas else ((),) * shape.n_layers,
        head_slices=slices,
        syncs=tuple(syncs) or tuple(range(1, shape.n_layers + 1)),
        copies=(1,) * (len(parts) - 1),
        seconds_per_token=0.001,
        alone_seconds=None,
        nodes_used=tuple(range(len(parts))),
        reason="drawn for a test",
        bytes_held=(0,) * len(parts),
    )


def wanted_of(plan: Plan, node: int) -> dict[int, tuple[int, ...]]:
    """What a worker must hold, as a manifest's `Wanted`."""
    wanted = {layer: nodes[node] for layer, nodes in enumerate(plan.groups) if nodes[node]}
    if plan.head_slices[node]:
        wanted[plan.n_layers] = plan.head_slices[node]
    return wanted


class Node:
    """A worker.

    Attributes:
        spoil: what becomes of its answers; None for nothing.
        computed: (plan, layer, rows) of each request.
        versions: of the adapters, of each request; 0 where it has no side values.
    """

    def __init__(self, slices: GroupSlices, streams: Streams, make: type[UdpWorker]) -> None:
        self._slices = slices
        self._backend = Backend(1)
        self.held = HeldShares(slices.shape, self._backend)
        self.udp = make(HOST, 0, self._compute)
        self.stream_port = streams.serve(self.udp)
        self.spoil: Spoil | None = None
        self.computed: list[tuple[int, int, int]] = []
        self.versions: list[int] = []

    def prepare(self, plan: Plan, number: int) -> None:
        wanted = wanted_of(plan, number)

        def ready() -> Iterator[ReadyShard]:
            for layer, numbers in self.held.missing(wanted).items():
                for n in numbers:
                    cut = (
                        self._slices.head_slice(n) if layer == plan.n_layers else self._slices.group(layer, n)
                    )
                    yield ReadyShard(layer, n, cut)

        self.held.load(plan.number, wanted, ready())

    def prepare_adapters(self, prepared: PreparedAdapters, number: int) -> None:
        """Hold its part of a version, as it comes over the control plane."""
        parts: SideParts | None = None
        for message in messages_for(MODEL, prepared, number):
            if parts is None:
                parts = SideParts(message, self.held.shape, self.held.widths(message.plan), 1 << 30)
            parts.add(message)
        if parts is not None:
            self.held.load_adapters(parts.plan, parts.version, parts.matrices())

    def _compute(self, session: int, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        sums = self.held.compute(plan, layer, n_rows, inputs)
        self.computed.append((plan, layer, n_rows))
        content = bytes(inputs[self.held.input_bytes(layer, n_rows) :])
        self.versions.append(ADAPTERS_VERSION.unpack_from(content)[0] if content else 0)
        return sums if self.spoil is None else self.spoil(plan, layer, sums)

    def close(self) -> None:
        self.udp.stop()
        self.held.close()
        self._backend.close()


class Streams:
    """Serves the compute streams of all workers, on one event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[grpc.aio.Server] = []

    def serve(self, worker: UdpWorker) -> int:
        """The port of a server that is the worker's."""

        class Servicer(cluster_pb2_grpc.ClusterServicer):
            async def Compute(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
                async with aclosing(serve_compute(worker, request_iterator)) as responses:
                    async for response in responses:
                        yield response

        async def start() -> int:
            server = grpc.aio.server(options=_OPTIONS)
            cluster_pb2_grpc.add_ClusterServicer_to_server(Servicer(), server)
            port = int(server.add_insecure_port(f"{HOST}:0"))
            await server.start()
            self._servers.append(server)
            return port

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def close(self) -> None:
        async def stop() -> None:
            await asyncio.gather(*(server.stop(0) for server in self._servers))
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Spread:
    """The coordinator and its workers. Made by `spread`."""

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        sequences: int,
        transport: str,
        group_size: int | None,
        kv_type: KVType,
    ) -> None:
        options = EngineOptions(
            threads=1, context=context, sequences=sequences, kv_type=kv_type, ffn=False, head=False
        )
        self.engine = Engine.load(path, options)
        self.model = self.engine.model
        self.slices = GroupSlices(self.engine.gguf, self.engine.hyperparameters, group_size)
        self.shape = self.slices.shape
        self.computer = ShareComputer(self.shape, self.model.backend)
        self.streams = Streams()
        self.nodes: list[Node] = []
        self.transport = transport
        self.coordinator: Coordinator | None = None
        self.link: Link
        self.bulk: GrpcLink | None = None
        self._channels: list[grpc.Channel] = []
        self._sessions = self._version = 0

    def node(self, number: int, make: type[UdpWorker] = UdpWorker) -> Node:
        """A worker by its number in plans."""
        while len(self.nodes) < number:
            self.nodes.append(Node(self.slices, self.streams, make))
        return self.nodes[number - 1]

    def use(
        self,
        plan: Plan,
        *,
        memory_bytes: int | None = None,
        prefill: bool = True,
        through: Callable[[Link], Link] = lambda link: link,
        secrets: dict[int, bytes] | None = None,
        ports: dict[int, int] | None = None,
        **more: Any,
    ) -> Coordinator:
        """Have the workers hold a plan and compute by it from now on, over new links.

        Args:
            through: stands between the coordinator and the link for single tokens.
            secrets: that workers have in place of the right ones.
            ports: that datagrams go to in place of the workers' own.
        """
        count = len(plan.names) - 1
        for number in range(1, count + 1):
            self.node(number).prepare(plan, number)
        before = self.coordinator
        shares = PlanShares(
            plan,
            self.computer,
            self.slices,
            self.engine.gguf,
            before.plan_shares if before is not None else None,
            memory_bytes,
        )
        old_link, old_bulk, old_channels = getattr(self, "link", None), self.bulk, self._channels
        self.bulk, self._channels = GrpcLink(), []
        udp = UdpLink(HOST)
        for number, node in enumerate(self.nodes[:count], start=1):
            self._sessions += 1
            secret = os.urandom(32)
            node.udp.add_session(self._sessions, (secrets or {}).get(number, secret), "coordinator")
            channel = grpc.insecure_channel(f"{HOST}:{node.stream_port}", _OPTIONS)
            self._channels.append(channel)
            self.bulk.add_worker(number, channel, self._sessions)
            port = (ports or {}).get(number, node.udp.port)
            udp.add_worker(number, HOST, port, self._sessions, secret)
        if self.transport == "grpc":
            udp.close()
            self.link = self.bulk
        else:
            self.link = udp
        self.coordinator = Coordinator(
            self.model,
            self.computer,
            shares,
            through(self.link),
            Tails([0.002] * count),
            prefill=Prefill(self.shape, self.bulk) if prefill else None,
            **more,
        )
        if before is not None:
            before.close(after=self.coordinator)
        self._end(old_link, old_bulk, old_channels)
        return self.coordinator

    def _end(self, link: Link | None, bulk: GrpcLink | None, channels: list[grpc.Channel]) -> None:
        if bulk is not None:
            bulk.close()
        if link is not None and link is not bulk:
            link.close()
        for channel in channels:
            channel.close()

    def apply(self, adapters: Adapters, ready: Collection[int] | None = None) -> PreparedAdapters:
        """Compute with these adapters from now on; `ready`: the workers that get to hold them, or all."""
        assert self.coordinator is not None
        self.model.set_adapters(adapters)
        self._version += 1
        shares = self.coordinator.plan_shares
        prepared = PreparedAdapters(adapters, self._version, self.shape, shares, self.computer)
        workers = range(1, len(shares.plan.names)) if ready is None else ready
        for number in workers:
            self.node(number).prepare_adapters(prepared, number)
        prepared.ready = frozenset(workers)
        self.coordinator.use(prepared)
        return prepared

    def forward(self, batch: Batch, requests: Sequence[Contributions] = ()) -> Result:
        assert self.coordinator is not None
        return self.coordinator.forward(batch, requests)

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, requests: Sequence[Contributions] = ()
    ) -> list[list[int]]:
        return greedy(self.model, lambda batch: self.forward(batch, requests), prompts, count)

    def close(self) -> None:
        self._end(getattr(self, "link", None), self.bulk, self._channels)
        for node in self.nodes:
            node.close()
        self.streams.close()
        if self.coordinator is not None:
            self.coordinator.close()
        self.computer.close()
        self.engine.close()


@contextmanager
def spread(
    path: Path,
    *,
    context: int = 512,
    sequences: int = 1,
    transport: str = "udp",
    group_size: int | None = None,
    kv_type: KVType = "f32",
) -> Iterator[Spread]:
    """A model, ready to be spread by `use`."""
    made = Spread(
        path,
        context=context,
        sequences=sequences,
        transport=transport,
        group_size=group_size,
        kv_type=kv_type,
    )
    try:
        yield made
    finally:
        made.close()


def write_model(folder: Path, model: SyntheticModel = FLOATS) -> Path:
    """A model's file."""
    path = folder / "model.gguf"
    write_synthetic_gguf(path, model)
    return path


def greedy(
    model: Any, forward: Callable[[Batch], Result], prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """So many likeliest tokens after each prompt, all prompts in one batch; no token ends a text."""
    for sequence in range(len(prompts)):
        model.cells.remove(sequence)
    numbers = list(range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    logits = forward(
        Batch(
            [token for prompt in prompts for token in prompt],
            np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            np.repeat(np.array(numbers, np.int32), lengths),
            (np.cumsum(lengths) - 1).tolist(),
        )
    ).logits
    found: list[list[int]] = []
    for step in range(count):
        tokens = logits.argmax(axis=1).astype(np.int32)
        found.append(tokens.tolist())
        if step + 1 < count:
            positions = np.array(lengths, np.int32) + step
            logits = forward(Batch(tokens, positions, np.array(numbers, np.int32))).logits
    return [list(row) for row in zip(*found, strict=True)]


def alone(
    path: Path,
    prompts: Sequence[Sequence[int]],
    count: int,
    context: int = 512,
    least_gap: float = 1e-3,
    kv_type: KVType = "f32",
) -> list[list[int]]:
    """`greedy` on one device, by choices that are clear.

    Sums in another order differ in their last bits. In a model of F32 they stay there. Where activations are
    quantized, and keys and values are F16, they tip a rounding now and then, which the layers after it
    multiply: the demo model's likeliest two logits, which differ by several as a rule, then come closer or
    drift apart by 0.03 (standard deviation; up to 0.2).

    Args:
        least_gap: by which the likeliest token is ahead of the next; else there is nothing to be compared.
    """
    options = EngineOptions(threads=1, context=context, sequences=len(prompts), kv_type=kv_type)
    gaps = []
    with Engine.load(path, options) as engine:

        def forward(batch: Batch) -> Result:
            result = engine.model.forward(batch)
            top = np.partition(result.logits, -2, axis=1)[:, -2:]
            gaps.append(float((top[:, 1] - top[:, 0]).min()))
            return result

        found = greedy(engine.model, forward, prompts, count)
    assert min(gaps) > least_gap, f"two tokens were only {min(gaps)} apart: take other prompts"
    return found


class Late:
    """A link whose answers come when told, as long as the token is relaxed; exact ones come as they do.

    Args:
        by: (worker, layer) -> 0: at the next boundary; k: so many boundaries later, or at the last; None:
            never.
    """

    def __init__(self, link: Link, by: Callable[[int, int], int | None]) -> None:
        self._link = link
        self._by = by
        self._layer = 0
        self._exact = True
        self._here: list[Answer] = []
        self._parts: dict[tuple[int, int], set[int]] = {}  # of answers that are not all here

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def begin_step(self, step: int) -> None:
        self._here.clear()
        self._parts.clear()
        self._link.begin_step(step)

    def send(self, worker: int, step: int, layer: int, n_rows: int, inputs: bytes, **more: Any) -> None:
        self._layer, self._exact = layer, more["exact"]
        self._parts[worker, layer] = set()
        self._link.send(worker, step, layer, n_rows, inputs, **more)

    def receive(self, timeout: float) -> Answer | None:
        if self._exact:
            return self._link.receive(timeout)
        while any(self._is_due(*of, last=timeout > 0) for of in self._parts):
            answer = self._link.receive(PATIENCE)
            assert answer is not None, "a worker did not answer"
            self._here.append(answer)
            of = (answer.worker, answer.layer)
            self._parts[of].add(answer.fragment)
            if len(self._parts[of]) == answer.n_fragments:
                del self._parts[of]
        for number, answer in enumerate(self._here):
            if self._is_due(answer.worker, answer.layer, last=timeout > 0):
                return self._here.pop(number)
        return None

    def _is_due(self, worker: int, layer: int, *, last: bool) -> bool:
        by = self._by(worker, layer)
        return by is not None and (last or layer + by <= self._layer)
