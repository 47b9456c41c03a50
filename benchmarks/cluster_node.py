"""One device of a measured cluster: the real parts without the daemon's HTTP, told what to do on stdin.

``python -m benchmarks.cluster_node HOME ADDRESS [SETTING=VALUE ...]``. Each line on stdin is one JSON
object with ``do``; each gives one JSON line on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edge_runtime.addresses import split_address
from edge_runtime.cluster.authority import found_cluster
from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.invitation import make_invitation
from edge_runtime.cluster.joining import join
from edge_runtime.cluster.node import ClusterNode
from edge_runtime.cluster.partitioned_model import PartitionedModel
from edge_runtime.cluster.settings import ClusterSettings
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import EdgeRuntimeError

Value = TypeVar("Value")
_CHANGEABLE = ("mode", "quality", "transport", "memory_bytes")
_GREEDY = SamplingParameters(temperature=0)


class Recorder:
    """Collects what became of each fragment, token by token."""

    def __init__(self) -> None:
        self.tokens: list[list[tuple[int, int, int, int, int]]] = [[]]

    def __call__(self, layer: int, worker: int, fragment: int, n_fragments: int, by: int) -> None:
        """See `outstanding.Record`."""
        self.tokens[-1].append((layer, worker, fragment, n_fragments, by))

    def end_token(self) -> None:
        """The next ones belong to the next token."""
        self.tokens.append([])


class NodeProcess:
    """What the commands act on."""

    def __init__(self, home: Path, address: str, values: dict[str, str]) -> None:
        self._home = home
        self._address = address
        defaults = ClusterSettings()
        typed: dict[str, Any] = {name: type(getattr(defaults, name))(text) for name, text in values.items()}
        self._settings = ClusterSettings(listen=address, address=address, **typed)
        self._node: ClusterNode | None = None
        self._engine: Engine | None = None
        self._model: PartitionedModel | None = None
        self._alone: Engine | None = None
        self._turn = threading.Lock()  # of who uses the engine: a token, or a change of plan
        self._follows = False  # members that go and come
        self._replanning: asyncio.Task[None] | None = None

    async def found(self, command: dict[str, Any]) -> dict[str, Any]:
        """Become the founder; gives one invitation for each other device."""
        found_cluster(self._home, command["name"], self._address)
        await self._start()
        count = range(command["invitations"])
        return {"invitations": [make_invitation(self._home, [self._address]).text() for _ in count]}

    async def join(self, command: dict[str, Any]) -> dict[str, Any]:
        """Become a member."""
        identity = await join(self._home, command["invitation"], command["name"], self._address)
        await self._start()
        return {"name": identity.name}

    async def open(self, command: dict[str, Any]) -> dict[str, Any]:
        """Take part again, as a member that was started anew."""
        await self._start()
        return {}

    async def _start(self) -> None:
        self._node = ClusterNode.open(self._home, self._settings, cache_folder=self._home / "shards")
        assert self._node is not None
        self._node.on_change(self._members_changed)
        await self._node.start()

    async def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Spread a model; with ``follow`` plan anew when members go and come, as the daemon does."""
        assert self._node is not None
        await self.unload(command)
        self._set(command)
        await self._everybody()
        options = replace(_engine_options(command), ffn=False, head=False)
        self._engine = await asyncio.to_thread(Engine.load, command["path"], options)

        def in_turn(function: Callable[[], Value]) -> Value:
            with self._turn:
                return function()

        async def between_tokens(function: Callable[[], Value]) -> Value:
            return await asyncio.to_thread(in_turn, function)

        self._model = PartitionedModel("model", self._engine, self._node, between_tokens)
        started = time.perf_counter()
        await self._model.start()
        self._follows = command.get("follow", False)
        return {"seconds": time.perf_counter() - started} | await self.report(command)

    def _members_changed(self) -> None:
        if self._follows and (self._replanning is None or self._replanning.done()):
            self._replanning = asyncio.create_task(self._replan_if_outdated())

    async def _replan_if_outdated(self) -> None:
        with contextlib.suppress(EdgeRuntimeError):
            if self._model is not None and self._model.is_outdated:
                await self._model.replan()

    def _set(self, command: dict[str, Any]) -> None:
        assert self._node is not None
        changed = {name: command[name] for name in _CHANGEABLE if name in command}
        self._node.settings = self._settings = replace(self._settings, **changed)

    async def load_alone(self, command: dict[str, Any]) -> dict[str, Any]:
        """The same model on this device alone, as `edgert` runs it without a cluster."""
        self._alone = await asyncio.to_thread(Engine.load, command["path"], _engine_options(command))
        return {}

    async def replan(self, command: dict[str, Any]) -> dict[str, Any]:
        """Measure the links anew and plan anew."""
        assert self._model is not None and self._node is not None
        self._set(command)
        await self._everybody()
        await self._model.replan()
        return await self.report(command)

    async def _everybody(self) -> None:
        """Look until all members answer, or for some seconds: they may have joined just now."""
        assert self._node is not None
        for _ in range(10):
            if all(peer.description is not None for peer in await self._node.refresh()):
                return
            await asyncio.sleep(0.3)

    async def report(self, command: dict[str, Any]) -> dict[str, Any]:
        """The plan, and where the time goes."""
        assert self._model is not None
        plan = self._model.coordinator.plan_shares.plan if self._model.coordinator else None
        groups = [[list(of) for of in nodes] for nodes in plan.groups] if plan else []
        members = (
            [asdict(member) for member in self._node.report([self._model]).members] if self._node else []
        )
        return {"report": asdict(self._model.report()), "groups": groups, "members": members}

    async def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Decode greedily.

        Gives the times of each token but the first, in seconds, and, of a spread model, ``trace``: the
        contributions that were on time, and computed here, up to each token's end.
        """
        return await asyncio.to_thread(self._generate, command)

    def _generate(self, command: dict[str, Any]) -> dict[str, Any]:
        engine = self._alone if command.get("alone") else self._engine
        assert engine is not None
        recorder = None
        decoding = engine.decoding(command["prompt"], sampling=_GREEDY, max_tokens=command["tokens"])
        if not command.get("alone"):
            assert self._model is not None and self._model.coordinator is not None
            decoding.forwarding = self._model.contributions(command.get("mode"), command.get("quality"))
            if command.get("record"):
                recorder = Recorder()
                self._model.coordinator.record(recorder)
        engine.begin(decoding)
        times, tokens, trace = [], [], []
        cpu = time.process_time()
        started = time.perf_counter()
        while decoding.finish_reason is None:
            begun = time.perf_counter()
            with self._turn:
                pieces = engine.advance([decoding])
            times.append(time.perf_counter() - begun)
            tokens += [token for _, piece in pieces for token in piece.tokens]
            if recorder is not None:
                recorder.end_token()
            if isinstance(decoding.forwarding, Contributions):
                trace.append((decoding.forwarding.on_time, decoding.forwarding.recomputed))
        engine.end(decoding)
        found: dict[str, Any] = {
            "times": times[1:],
            "first": times[0],
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - cpu,
            "tokens": tokens,
        }
        if isinstance(decoding.forwarding, Contributions):
            counts = asdict(replace(decoding.forwarding, meter=None))
            found |= {"contributions": counts, "trace": trace}
        if recorder is not None:
            self._model.coordinator.record(None)  # type: ignore[union-attr]
            found["recorded"] = recorder.tokens[1:-1]
        return found

    async def unload(self, command: dict[str, Any]) -> dict[str, Any]:
        """Let go of the model."""
        self._follows = False
        if self._replanning is not None:
            await self._replanning
        if self._model is not None:
            await self._model.close()
        if self._engine is not None:
            self._engine.close()
        self._model = self._engine = None
        return {}

    async def memory(self, command: dict[str, Any]) -> dict[str, Any]:
        """Resident memory that is not shared with a file, bytes."""
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return {"anonymous": int(fields["RssAnon"].split()[0]) * 1024}

    async def stop(self, command: dict[str, Any]) -> dict[str, Any]:
        """End."""
        await self.unload(command)
        if self._alone is not None:
            self._alone.close()
        if self._node is not None:
            await self._node.stop()
        return {}


def _engine_options(command: dict[str, Any]) -> EngineOptions:
    return EngineOptions(
        threads=1, context=command.get("context", 512), kv_type=command.get("kv_type", "f16")
    )


async def _serve(process: NodeProcess) -> None:
    loop = asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        command = json.loads(line)
        try:
            handler: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] = getattr(process, command["do"])
            answer = await handler(command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer, default=_plain) + "\n")
        sys.stdout.flush()
        if command["do"] == "stop":
            return


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")


def main(make: type[NodeProcess] = NodeProcess) -> None:
    """The program; `make` makes what the commands act on."""
    home = Path(sys.argv[1])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    values = dict(argument.split("=", 1) for argument in sys.argv[3:])
    split_address(sys.argv[2])
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(make(home, sys.argv[2], values)))
    os._exit(0)  # nothing to be saved, and threads of a broken network would be waited for


if __name__ == "__main__":
    main()
