"""Adapters of a model whose neuron groups are computed in several places: one version of the set at a time.

The coordinator cuts the side paths of a version for everybody's groups, gives the workers theirs, and changes
to the version between two tokens. A request for a contribution that has side paths names the version and has
the rows' side values (`exchange.content_of`). So the answer to a request is of one version, and so is a
token, whose requests all name the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import content_of
from edge_runtime.cluster.plan_shares import PlanShares
from edge_runtime.engine.adapters import Adapters
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.share_sides import ShareSide, SideMatrices, SideStacks
from edge_runtime.engine.shares import Share, ShareComputer
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

# Side values of a row that datagrams carry beside its inputs; with more, everything is computed here.
MAX_WIDTH = 1 << 14


class PreparedAdapters:
    """A version of the adapters for one plan. Make it anywhere; use and close it on the engine's thread.

    Args:
        adapters: by version, as the engine's bank has them; checked.
        version: of the set, above 0 and unlike any other of this plan.

    Attributes:
        names: of the adapters.
        sides: the side paths of the plan's shares that have one.
        ready: workers that hold their part.

    Raises:
        OutOfMemoryError: the side paths do not fit.
    """

    def __init__(
        self,
        adapters: Adapters,
        version: int,
        shape: PartitionShape,
        shares: PlanShares,
        computer: ShareComputer,
    ) -> None:
        self.version = version
        self.names = frozenset(adapters)
        self.shares = shares
        self.ready: frozenset[int] = frozenset()
        self._shape = shape
        self._computer = computer
        self._stacks = SideStacks(adapters, shape)
        self._projections: dict[int, Share] = {}
        self.sides: dict[Share, ShareSide] = {}
        try:
            for layer in self._stacks.layers:
                a = self._stacks.projection(layer)
                if a is not None:
                    self._projections[layer] = computer.projection(a)
            for share in shares.all_shares():
                matrices = self._stacks.matrices(share.layer, share.ids)
                if matrices:
                    self.sides[share] = computer.side(share, matrices)
        except BaseException:
            self.close()
            raise

    @property
    def layers(self) -> list[int]:
        """Those that have side paths; the number of layers stands for the head."""
        return self._stacks.layers

    @property
    def widest(self) -> int:
        """Side values of a row, at most."""
        return max(map(self._stacks.width, self.layers), default=0)

    def matrices(self, layer: int, worker: int) -> SideMatrices:
        """What a worker needs for its part of a layer, or of the head; empty where it has none."""
        plan = self.shares.plan
        ids = plan.head_slices[worker] if layer == self._shape.n_layers else plan.groups[layer][worker]
        return self._stacks.matrices(layer, sorted(ids)) if ids else {}

    def values(self, layer: int, inputs: Floats, strengths: Mapping[str, Floats]) -> Floats | None:
        """Side values (n_rows, width) for inputs (n_rows, n_embd); None where nothing is switched on."""
        if not self._stacks.width(layer):
            return None
        projection = self._projections.get(layer)
        projected = self._computer.compute(projection, inputs) if projection is not None else None
        return self._stacks.values(layer, projected, strengths)

    def close(self) -> None:
        """Free all of it; nothing may compute with it. Safe to call twice."""
        for share, side in self.sides.items():
            share.drop_side(side)
        for projection in self._projections.values():
            projection.close()
        self.sides.clear()
        self._projections.clear()


class TokenAdapters:
    """What one batch is computed with, from its first layer to its head.

    Args:
        strengths: adapter -> (n_rows,), of the batch.

    Raises:
        RequestError: an adapter that this version does not have.
    """

    def __init__(self, prepared: PreparedAdapters | None, strengths: Mapping[str, Floats]) -> None:
        names = prepared.names if prepared is not None else frozenset()
        if not names.issuperset(strengths):
            raise RequestError(
                f"{len(strengths)} adapters are asked for, and {len(names)} are prepared; apply them first"
            )
        self._prepared = prepared
        self._strengths = strengths

    @property
    def version(self) -> int:
        """Of the set; 0 where no adapter is used."""
        return self._prepared.version if self._prepared is not None and self._strengths else 0

    @property
    def widest(self) -> int:
        """Side values of a row, at most."""
        return self._prepared.widest if self._prepared is not None and self._strengths else 0

    def able(self, workers: Collection[int]) -> set[int]:
        """Those of some workers that can compute with these."""
        found = set(workers)
        return found & self._prepared.ready if self._prepared is not None and self._strengths else found

    def values(self, layer: int, inputs: Floats, rows: NDArray[np.int32] | None = None) -> Floats | None:
        """Side values of a layer's inputs (n_rows, n_embd); None where nothing is switched on.

        Args:
            rows: of the batch, that the inputs belong to; None for all.
        """
        if self._prepared is None or not self._strengths:
            return None
        strengths = self._strengths
        if rows is not None:
            strengths = {name: values[rows] for name, values in strengths.items()}
        return self._prepared.values(layer, inputs, strengths)

    def content(self, inputs: bytes, values: Floats | None) -> bytes:
        """A request's content."""
        return content_of(inputs, self.version, values)
