"""From the coordinator to the workers: the parts of a version of the adapters."""

from __future__ import annotations

import asyncio
import logging

from edge_runtime.cluster.background import in_background
from edge_runtime.cluster.participants import Participant, Participants
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.cluster.prepared_adapters import MAX_WIDTH, PreparedAdapters
from edge_runtime.cluster.side_parts import messages_for
from edge_runtime.engine.adapters import Adapters
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.shares import ShareComputer
from edge_runtime.errors import EdgeRuntimeError

_log = logging.getLogger("edgert.cluster")


class AdapterDistribution:
    """Makes the versions of one model's adapters, and gives the workers their parts.

    Args:
        model: SHA-256 of its manifest.
    """

    def __init__(self, model: str, shape: PartitionShape, computer: ShareComputer) -> None:
        self._model = model
        self._shape = shape
        self._computer = computer
        self._version = 0

    async def prepare(
        self, adapters: Adapters, shares: PlanShares, participants: Participants
    ) -> PreparedAdapters | None:
        """A version for a plan, which those of its workers hold that are able to; None without adapters.

        Raises:
            OutOfMemoryError: this device has no memory for it.
        """
        if not adapters:
            return None
        self._version += 1
        version = self._version
        prepared = await in_background(
            lambda: PreparedAdapters(adapters, version, self._shape, shares, self._computer)
        )
        await self.offer(prepared, participants)
        return prepared

    async def offer(self, prepared: PreparedAdapters, participants: Participants) -> None:
        """Give their parts to the workers that do not hold them yet."""
        used = prepared.shares.plan.nodes_used
        lacking = [m for m in participants.members if m.node in used and m.node not in prepared.ready]
        if prepared.widest > MAX_WIDTH:
            _log.warning("the adapters have %d ranks in one layer: all is computed here", prepared.widest)
            return
        outcomes = await asyncio.gather(*(self._give(prepared, member) for member in lacking))
        prepared.ready |= {member.node for member, ready in zip(lacking, outcomes, strict=True) if ready}

    async def _give(self, prepared: PreparedAdapters, member: Participant) -> bool:
        """Whether the member holds its part now."""
        messages = await in_background(lambda: list(messages_for(self._model, prepared, member.node)))
        try:
            if messages:
                await member.client.prepare_adapters(messages)
        except EdgeRuntimeError as error:
            _log.warning("%s computes nothing with the adapters: %s", member.name, error)
            return False
        return True
