"""The daemon's part in a cluster: the node, and the models that are spread over it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cluster.identity import read_identity
from edge_runtime.cluster.settings import ClusterSettings
from edge_runtime.daemon.config import ClusterConfig
from edge_runtime.daemon.device import read_strain
from edge_runtime.engine.backend import default_threads
from edge_runtime.errors import ConfigError, EdgeRuntimeError

if TYPE_CHECKING:
    from edge_runtime.cluster.node import ClusterNode
    from edge_runtime.cluster.partitioned_model import BetweenTokens, PartitionedModel
    from edge_runtime.cluster.report import ClusterReport
    from edge_runtime.engine.engine import Engine

_log = logging.getLogger("edgert.cluster")

_MB = 1 << 20


def cluster_settings(config: ClusterConfig) -> ClusterSettings:
    """The settings in the cluster's own terms."""
    return ClusterSettings(
        listen=config.listen,
        address=config.address,
        peers=tuple(address.strip() for address in config.peers.split(",") if address.strip()),
        lend_bytes=config.lend_memory_mb * _MB,
        memory_bytes=config.memory_mb * _MB,
        threads=config.threads or default_threads(),
        transport=config.transport,
        mode=config.mode,
        quality=config.quality,
        discovery=config.discovery,
    )


class Cluster:
    """Make and use it on the daemon's event loop. Nothing happens on a device that belongs to no cluster.

    Args:
        home: folder of the daemon's state.
    """

    def __init__(self, config: ClusterConfig, home: Path) -> None:
        self._config = config
        self._home = home
        self._node: ClusterNode | None = None
        self._models: dict[str, PartitionedModel] = {}
        self._replanning: asyncio.Task[None] | None = None
        self._again = False

    @property
    def active(self) -> bool:
        """Whether this device belongs to a cluster."""
        return self._node is not None

    async def start(self) -> None:
        """Take part, if this device belongs to a cluster by now; also called again on a reload.

        Raises:
            ConfigError: the cluster's files are damaged, or its address cannot be listened at.
            DependencyError: the extra `discovery` is asked for and not installed.
        """
        if self._node is not None or read_identity(self._home) is None:
            return
        # Imported here: most devices are in no cluster, and these parts take memory.
        from edge_runtime.cluster.node import ClusterNode

        try:
            node = ClusterNode.open(self._home, cluster_settings(self._config), strain=read_strain)
        except ValueError as error:
            raise ConfigError(f"[cluster]: {error}") from error
        if node is None:
            return
        try:
            await node.start()
        except BaseException:
            await node.stop()
            raise
        node.on_change(self._members_changed)
        self._node = node

    async def reload(self) -> None:
        """After a join or a leave on the command line."""
        if self._node is not None:
            found = read_identity(self._home)
            if found is None or found.fingerprint != self._node.identity.fingerprint:
                await self.stop()
            else:
                self._node.look_again()
        await self.start()

    async def spread(self, name: str, engine: Engine, between_tokens: BetweenTokens) -> PartitionedModel:
        """Spread a model that was loaded without its FFNs.

        Raises:
            EdgeRuntimeError: it cannot be; the engine is as it was.
        """
        from edge_runtime.cluster.partitioned_model import PartitionedModel

        assert self._node is not None
        if not self._node.peers:
            await self._node.refresh()
        model = PartitionedModel(name, engine, self._node, between_tokens)
        try:
            await model.start()
        except BaseException:
            await model.close()
            raise
        self._models[name] = model
        return model

    async def release(self, name: str) -> None:
        """The model's engine has stopped and will be freed."""
        model = self._models.pop(name, None)
        if model is not None:
            await model.close()

    def report(self) -> ClusterReport | None:
        """The cluster at this moment; None where there is none."""
        if self._node is None:
            return None
        return self._node.report(list(self._models.values()))

    def _members_changed(self) -> None:
        if self._replanning is not None and not self._replanning.done():
            self._again = True
            return
        if any(model.is_outdated for model in self._models.values()):
            self._replanning = asyncio.create_task(self._replan(), name="cluster replan")

    async def _replan(self) -> None:
        while True:
            self._again = False
            for name, model in list(self._models.items()):
                try:
                    if model.is_outdated:
                        await model.replan()
                except EdgeRuntimeError as error:
                    _log.warning("the plan for %s stays as it is: %s", name, error)
            if not self._again:
                return

    async def stop(self) -> None:
        """Leave the others alone; models must have been released."""
        if self._replanning is not None:
            self._replanning.cancel()
            await asyncio.gather(self._replanning, return_exceptions=True)
        if self._node is not None:
            node, self._node = self._node, None
            await node.stop()
