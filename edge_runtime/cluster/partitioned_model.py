"""A loaded model spread over the cluster: which members take part, what they hold, when that changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import psutil

from edge_runtime.cluster.adapter_distribution import AdapterDistribution
from edge_runtime.cluster.background import in_background
from edge_runtime.cluster.calibration_file import Calibration, find_calibration
from edge_runtime.cluster.contributions import Contributions
from edge_runtime.cluster.coordinator import Coordinator
from edge_runtime.cluster.fills import Fills
from edge_runtime.cluster.manifest import load_manifest
from edge_runtime.cluster.node import ClusterNode
from edge_runtime.cluster.participants import Participant, Participants, gather, node_shares
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.planning import Planner, is_from_the_file
from edge_runtime.cluster.prefill import Prefill
from edge_runtime.cluster.prepared_adapters import PreparedAdapters
from edge_runtime.cluster.profiling import model_profile
from edge_runtime.cluster.report import LayerReport, PartitionReport
from edge_runtime.cluster.shard_cache import default_folder
from edge_runtime.cluster.worker_health import WorkerHealth
from edge_runtime.engine.adapters import Adapters, check_changes, version_of
from edge_runtime.engine.batch import Batch, Result
from edge_runtime.engine.decoding import Decoding
from edge_runtime.engine.engine import Engine
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.share_speed import measure_share
from edge_runtime.engine.shares import ShareComputer
from edge_runtime.errors import EdgeRuntimeError, RequestError
from edge_runtime.v1 import cluster_pb2 as wire
from scheduler.drift import Drift
from scheduler.plan import Plan
from scheduler.profiles import DeviceProfile

_log = logging.getLogger("edgert.cluster")

Value = TypeVar("Value")

_OWN_SHARE_SECONDS = 12e-6  # of starting to compute a share; measured
# Looks at the plan while it is in force; several must agree before it is changed (scheduler.drift).
_CONSIDER_SECONDS = 10.0
_LEAST_SECONDS_BETWEEN_PLANS = 60.0
# Change of a token's predicted time that makes it worth looking for another plan.
_NOTEWORTHY = 0.15
# A thread that computes Python, a plan for example, would keep the engine's thread waiting for 5 ms after
# each of a token's hundred calls of native code.
_SWITCH_SECONDS = 2e-4
_SPARE_MEMORY = 0.85  # part of the free memory that weights may take where no limit is set


class BetweenTokens(Protocol):
    """Runs something on the engine's thread, between two tokens."""

    def __call__(self, function: Callable[[], Value], /) -> Awaitable[Value]: ...


class PartitionedModel:
    """One engine, loaded without its FFNs, and the members that compute these with it.

    Make and use it on the daemon's event loop: `start`, `replan` when members come and go, `close`.

    Args:
        name: of the model.
        engine: loaded with ``ffn=False`` and ``head=False``.
        between_tokens: used from the first plan on; until then nothing else runs the engine.
    """

    def __init__(self, name: str, engine: Engine, node: ClusterNode, between_tokens: BetweenTokens) -> None:
        self.name = name
        self._engine = engine
        self._node = node
        self._between_tokens = between_tokens
        self._changing = asyncio.Lock()
        self._number = 0
        self._participants: Participants | None = None
        self._expected = 1.0  # seconds of a token, when the plan was made
        self._drift = Drift(_LEAST_SECONDS_BETWEEN_PLANS)
        self._planning: asyncio.Task[None] | None = None
        self.coordinator: Coordinator | None = None
        self.calibration: Calibration | None = None

    async def start(self) -> None:
        """Make the first plan and carry it out.

        Raises:
            EdgeRuntimeError: it cannot be spread.
        """
        engine = self._engine
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self.calibration = await asyncio.to_thread(self._sound_calibration)
        size = self.calibration.group_size if self.calibration is not None else None
        self._slices = GroupSlices(engine.gguf, engine.hyperparameters, size)
        self._manifest = await asyncio.to_thread(
            load_manifest, self._slices, engine.gguf.path, default_folder()
        )
        self._node.source.add_model(self._manifest, self._slices)
        backend = engine.model.backend
        self._computer = ShareComputer(self._slices.shape, backend)
        self._distribution = AdapterDistribution(self._manifest.model, self._slices.shape, self._computer)
        self._speed = await asyncio.to_thread(measure_share, self._slices.shape, backend)
        await self.replan()
        self._planning = asyncio.create_task(self._keep_planning(), name=f"plans for {self.name}")

    def _sound_calibration(self) -> Calibration | None:
        """What is known of the model; nothing where that is damaged, or of another model."""
        try:
            return find_calibration(self._engine.gguf)
        except EdgeRuntimeError as error:
            _log.warning("%s is spread as if it had never been calibrated: %s", self.name, error)
            return None

    # --- plans --------------------------------------------------------------------------------

    async def replan(self) -> None:
        """See who takes part now, measure them, plan, have them prepare, and switch between two tokens."""
        async with self._changing:
            before = self._participants
            peers = [peer for peer in self._node.peers if peer.description is not None]
            participants = await gather(self._node, peers, self._manifest.model, self._slices.shape)
            self._planner = self._make_planner()
            participants.measure(self._planner.model)
            try:
                await self._carry_out(participants)
            except BaseException:
                await participants.close()
                raise
            if before is not None:
                await before.close()

    async def _carry_out(self, participants: Participants) -> None:
        """Plan for these members as they are now, and switch to the plan."""
        plan = await self._prepared_plan(participants)
        shares = await in_background(lambda: self._shares(plan))
        adapters = await self._distribution.prepare(self._bank(), shares, participants)
        await self._install(shares, participants, adapters)
        self._drift.changed(time.monotonic())
        self._expected = self._planner.seconds(plan, self.own_profile(), participants.profiles())
        _log.info("plan %d: %s", plan.number, plan.reason)

    async def _prepared_plan(self, participants: Participants) -> Plan:
        """A plan whose workers hold what it asks of them; those that cannot are left out."""
        unfit: set[str] = set()
        while True:
            self._number += 1
            plan = await in_background(
                partial(self._planner.plan, self._number, self.own_profile(), participants.profiles(), unfit)
            )
            working = [member for member in participants.members if member.node in plan.nodes_used]
            outcomes = await asyncio.gather(
                *(self._prepare(plan, member, working) for member in working), return_exceptions=True
            )
            failed = {
                member.name: outcome
                for member, outcome in zip(working, outcomes, strict=True)
                if isinstance(outcome, BaseException)
            }
            if not failed:
                return plan
            for name, error in failed.items():
                if not isinstance(error, EdgeRuntimeError):
                    raise error
                _log.warning("%s cannot take its part: %s", name, error)
            unfit |= failed.keys()

    async def _keep_planning(self) -> None:
        """Change the plan when devices or links have become others than it was made for."""
        while True:
            await asyncio.sleep(_CONSIDER_SECONDS)
            if self._missed():
                self._node.look_again()
            try:
                async with self._changing:
                    await self._consider()
                    await self._tidy_adapters()
            except EdgeRuntimeError as error:
                _log.warning("the plan stays as it is: %s", error)

    async def _consider(self) -> None:
        coordinator, participants = self.coordinator, self._participants
        if coordinator is None or participants is None or not participants.members:
            return
        plan = coordinator.plan_shares.plan
        own, profiles = self.own_profile(), participants.profiles()
        now = self._planner.seconds(plan, own, profiles)
        # Looking for a better plan takes this device's time; where nothing has changed there is none.
        if abs(now / self._expected - 1) < _NOTEWORTHY:
            return
        best = await in_background(partial(self._planner.plan, self._number, own, profiles))
        if self._drift.consider(now, best.seconds_per_token, time.monotonic()):
            await self._carry_out(participants)

    def _make_planner(self) -> Planner:
        settings = self._node.settings
        model = model_profile(self._slices.shape, self._engine.gguf, exact=settings.mode == "exact")
        return Planner(model, self.calibration, settings.mode, settings.quality)

    def own_profile(self) -> DeviceProfile:
        """This device, for the scheduler."""
        limit = self._node.settings.memory_bytes
        if not limit:
            held = self.coordinator.plan_shares.nbytes if self.coordinator is not None else 0
            free = int(psutil.virtual_memory().available * _SPARE_MEMORY)
            limit = free + held + self._engine.model.weights.repacked_bytes
        name = self._node.identity.name
        return DeviceProfile(name, self._speed, limit, overhead_seconds=_OWN_SHARE_SECONDS)

    async def _prepare(self, plan: Plan, member: Participant, working: Sequence[Participant]) -> None:
        neighbours = [other.peer.member.address for other in working if other is not member]
        request = wire.PrepareRequest(
            manifest=self._manifest.content,
            layers=[wire.LayerGroups(groups=nodes[member.node]) for nodes in plan.groups],
            head_slices=plan.head_slices[member.node],
            sources=neighbours,
            plan=plan.number,
        )
        async for progress in member.client.prepare(request):
            if progress.ready:
                return

    # --- carrying a plan out ------------------------------------------------------------------

    def _shares(self, plan: Plan) -> PlanShares:
        before = self.coordinator.plan_shares if self.coordinator is not None else None
        room = None
        if is_from_the_file(plan):
            room = max(self.own_profile().memory_bytes - self._engine.model.weights.repacked_bytes, 0)
        return PlanShares(plan, self._computer, self._slices, self._engine.gguf, before, room)

    async def _install(
        self, shares: PlanShares, participants: Participants, adapters: PreparedAdapters | None
    ) -> None:
        """Let a plan's coordinator compute from the next token on."""
        before, same_links = self.coordinator, participants is self._participants
        calibration, planner = self.calibration, self._planner
        participants.expect(shares)

        def switch() -> Coordinator:
            coordinator = Coordinator(
                self._engine.model,
                self._computer,
                shares,
                participants.link,
                participants.tails,
                prefill=Prefill(self._slices.shape, participants.bulk) if participants.members else None,
                response=calibration.response if calibration is not None else None,
                quality=planner.quality if planner.mode == "relaxed" else 1.0,
                fills=Fills(calibration.means) if calibration and calibration.fill == "mean" else None,
                health=participants.health,
                measured=participants.measured,
                adapters=adapters,
                step=before.step if before is not None and same_links else 0,
            )
            self._engine.forward_pass = self._forward(coordinator)
            if before is not None:
                before.close(after=coordinator)
            return coordinator

        self.coordinator = switch() if before is None else await self._between_tokens(switch)
        self._participants = participants

    @staticmethod
    def _forward(coordinator: Coordinator) -> Callable[[Batch, Sequence[Decoding]], Result]:
        def forward(batch: Batch, decodings: Sequence[Decoding]) -> Result:
            requests = []
            for decoding in decodings:
                if not isinstance(decoding.forwarding, Contributions):
                    decoding.forwarding = Contributions()
                requests.append(decoding.forwarding)
            return coordinator.forward(batch, requests)

        return forward

    # --- adapters -----------------------------------------------------------------------------

    async def set_adapters(self, adapters: Adapters) -> None:
        """Apply these adapters, and no others, from the next answer on; the workers hold them by then.

        A worker that cannot hold them is not asked for tokens that use them.

        Raises:
            RequestError: an adapter that does not fit the model; all stays as it was.
            OutOfMemoryError: they do not fit.
        """
        engine = self._engine
        for name, changes in adapters.items():
            check_changes(name, changes, engine.model.weights)
        async with self._changing:
            # What answers in progress use stays beside what is new until they have ended.
            versions = {**self._bank(), **{version_of(changes): changes for changes in adapters.values()}}
            await self._switch_adapters(versions, lambda: engine.set_adapters(adapters))

    def _bank(self) -> Adapters:
        """What the engine's answers can use now, by version."""
        bank = self._engine.model.adapters
        return bank.adapters if bank is not None else {}

    async def _switch_adapters(self, versions: Adapters, then: Callable[[], None]) -> None:
        """Have everybody compute with these from one token on, and do something between it and the last."""
        coordinator, participants = self.coordinator, self._participants
        assert coordinator is not None and participants is not None
        before = prepared = coordinator.adapters
        if versions.keys() != (before.names if before is not None else frozenset()):
            prepared = await self._distribution.prepare(versions, coordinator.plan_shares, participants)

        def switch() -> None:
            then()
            coordinator.use(prepared)

        try:
            await self._between_tokens(switch)
        except Exception:
            if prepared is not None and prepared is not coordinator.adapters:
                prepared.close()
            raise

    async def _tidy_adapters(self) -> None:
        """Leave out versions that no answer uses any more, and ask workers again that could not hold them."""
        coordinator, participants = self.coordinator, self._participants
        if coordinator is None or participants is None:
            return
        bank, held = self._bank(), coordinator.adapters
        if bank.keys() != (held.names if held is not None else frozenset()):
            await self._switch_adapters(bank, lambda: None)
        elif held is not None:
            await self._distribution.offer(held, participants)

    # --- for requests and people --------------------------------------------------------------

    def contributions(self, mode: str | None, quality: float | None) -> Contributions:
        """What a request's decoding carries.

        Raises:
            RequestError: a relaxed request of a model that was never calibrated, or a quality out of range.
        """
        settings = self._node.settings
        if (mode or settings.mode) == "exact":
            return Contributions(quality=1.0)
        wanted = settings.quality if quality is None else quality
        if not 0 < wanted <= 1:
            raise RequestError(f"quality = {wanted}; needed is a number above 0, at most 1")
        if self.calibration is None:
            if mode == "relaxed":
                raise RequestError(
                    "this model was never calibrated, so nobody knows what `relaxed` costs it; run "
                    "`edgert calibrate MODEL --text FILE`, or ask for the mode `exact`"
                )
            return Contributions(quality=1.0)
        return Contributions(quality=wanted)

    @property
    def is_outdated(self) -> bool:
        """Whether others could take part than those who do, or one is there that does not answer any more.

        The latter was started again and lost its session, or datagrams get through no more.
        """
        lending = {
            peer.member.name
            for peer in self._node.peers
            if peer.description is not None and peer.description.memory_bytes
        }
        participants = self._participants
        return participants is not None and (
            lending != participants.names or not lending.isdisjoint(self._missed())
        )

    def _missed(self) -> set[str]:
        """Members that did not answer, and were to come back by now."""
        coordinator, participants, now = self.coordinator, self._participants, time.perf_counter()
        if coordinator is None or participants is None:
            return set()
        return {
            member.name
            for member in participants.members
            if coordinator.health[member.node].is_missed(now, participants.link.last_seen(member.node))
        }

    def report(self) -> PartitionReport:
        """The model at this moment."""
        coordinator, participants, settings = self.coordinator, self._participants, self._node.settings
        assert coordinator is not None and participants is not None
        plan, times, totals = coordinator.plan_shares.plan, coordinator.times, coordinator.totals
        return PartitionReport(
            model=self.name,
            plan=plan.number,
            reason=plan.reason,
            mode=settings.mode,
            quality=settings.quality,
            calibrated=self.calibration is not None,
            transport=participants.transport,
            round_trips=plan.round_trips,
            predicted_seconds=plan.seconds_per_token,
            measured_seconds=times.token,
            alone_seconds=plan.alone_seconds,
            nodes=node_shares(plan, self._speed, participants),
            layers=tuple(
                LayerReport(compute, wait, transfer, tuple(map(len, groups)))
                for compute, wait, transfer, groups in zip(
                    times.compute.tolist(),
                    times.wait.tolist(),
                    times.transfers.tolist(),
                    plan.groups,
                    strict=True,
                )
            ),
            syncs=plan.syncs,
            on_time=totals.on_time,
            late=tuple(totals.late),
            lost=totals.lost,
            recomputed=totals.recomputed,
            tokens=times.tokens,
        )

    def health_of(self, name: str) -> WorkerHealth | None:
        """How a member does its part here; None where it has none."""
        if self._participants is None or self.coordinator is None:
            return None
        nodes = [member.node for member in self._participants.members if member.name == name]
        used = self.coordinator.plan_shares.plan.nodes_used
        return self.coordinator.health[nodes[0]] if nodes and nodes[0] in used else None

    async def close(self) -> None:
        """End it; the engine must not run any more, and is closed by its owner."""
        if self._planning is not None:
            self._planning.cancel()
            await asyncio.gather(self._planning, return_exceptions=True)
            self._planning = None
        async with self._changing:
            if self.coordinator is not None:
                self.coordinator.close()
                self.coordinator = None
            if self._participants is not None:
                await self._participants.close()
                self._participants = None
            with contextlib.suppress(AttributeError):
                self._node.source.remove_model(self._manifest.model)
                self._computer.close()
