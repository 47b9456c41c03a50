"""What a plan means on the coordinator: which groups it computes itself, and how it computes a worker's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.engine.share_sides import ShareSide
from edge_runtime.engine.shares import Share, ShareComputer
from scheduler.plan import Plan

Floats = NDArray[np.float32]

_Key = tuple[int, tuple[int, ...]]  # layer, groups


class PlanShares:
    """The coordinator's shares under one plan. Shares that the plan before had as well are taken over.

    What computes takes side values (`engine.share_sides`) where a layer's side path is used.

    Args:
        gguf: the model's file: what is not held in memory is computed in place there.
        memory_bytes: for the coordinator's own groups; None: as much as they take.

    Attributes:
        sides: the side paths of the shares that have one, by share; whoever prepares them keeps them.

    Raises:
        OutOfMemoryError: the shares do not fit.
    """

    def __init__(
        self,
        plan: Plan,
        computer: ShareComputer,
        slices: GroupSlices,
        gguf: GGUFFile,
        before: PlanShares | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.plan = plan
        self.sides: Mapping[Share, ShareSide] = {}
        self._computer = computer
        self._slices = slices
        self._gguf = gguf
        self._held: dict[_Key, Share] = {}
        self._in_file: dict[_Key, Share] = {}
        self._known: Mapping[_Key, Share] = before._held if before is not None else {}
        self.shape = shape = slices.shape
        self.workers = [tuple(node for node in range(1, len(nodes)) if nodes[node]) for nodes in plan.groups]
        self.head_workers = tuple(n for n in range(1, len(plan.head_slices)) if plan.head_slices[n])
        self.own = self._own(memory_bytes)
        self._fallbacks: dict[tuple[int, int], tuple[Share, ...]] = {}
        for layer in range(shape.n_layers):
            spare = set(plan.replicas[layer])
            for worker in self.workers[layer]:
                groups = plan.groups[layer][worker]
                held = self._hold(layer, tuple(group for group in groups if group in spare))
                rest = self._in_place(layer, tuple(group for group in groups if group not in spare))
                self._fallbacks[layer, worker] = tuple(s for s in (held, *rest) if s is not None)
        self.head = self._head(plan.head_slices[0], hold=memory_bytes is None)
        self._head_of = {
            worker: self._head(plan.head_slices[worker], hold=False) for worker in self.head_workers
        }
        self._known = {}

    def share_of(self, layer: int, worker: int) -> float:
        """The part of a layer's groups that a worker has, 0 to 1."""
        return len(self.plan.groups[layer][worker]) / self._slices.shape.n_groups

    def weights_of(self, layer: int, worker: int) -> int:
        """Bytes of weights that a worker multiplies for a layer."""
        if layer == self.shape.n_layers:
            return sum(map(self.shape.head_slice_bytes, self.plan.head_slices[worker]))
        return sum(self.shape.group_bytes(layer, group) for group in self.plan.groups[layer][worker])

    def all_shares(self) -> Iterator[Share]:
        """Those that are computed here, and those that may have to be."""
        for shares in (*self.own, *self._fallbacks.values(), self.head, *self._head_of.values()):
            yield from shares

    def compute(self, layer: int, worker: int, inputs: Floats, values: Floats | None = None) -> Floats:
        """A worker's contribution, or its part of the logits, computed here; (n_rows, width)."""
        if layer == self.shape.n_layers:
            return self._compute_head(self._head_of[worker], inputs, values)
        shares = self._fallbacks[layer, worker]
        total = self._compute(shares[0], inputs, values).copy()
        for share in shares[1:]:
            total += self._compute(share, inputs, values)
        return total

    def _compute(self, share: Share, inputs: Floats, values: Floats | None) -> Floats:
        side = self.sides[share] if values is not None else None
        return self._computer.compute(share, inputs, side, values)

    def own_logits(self, inputs: Floats, values: Floats | None = None) -> Floats:
        """The coordinator's part of the logits, (n_rows, rows of its slices)."""
        return self._compute_head(self.head, inputs, values)

    def _compute_head(self, shares: tuple[Share, ...], inputs: Floats, values: Floats | None) -> Floats:
        parts = [self._compute(share, inputs, values).copy() for share in shares]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(inputs), 0), np.float32)

    def head_rows(self, node: int) -> NDArray[np.intp]:
        """The tokens whose logits a node computes, in its order."""
        size, shape = self.shape.head_slice_rows, self.shape
        rows = [np.arange(n * size, n * size + shape.slice_rows(n)) for n in self.plan.head_slices[node]]
        return np.concatenate(rows) if rows else np.empty(0, np.intp)

    def is_resident(self, layer: int, worker: int) -> bool:
        """Whether a worker's groups are in this device's memory too."""
        if layer == self.shape.n_layers:
            return False
        return not any(share.in_file for share in self._fallbacks[layer, worker])

    def _own(self, memory_bytes: int | None) -> list[tuple[Share, ...]]:
        """The coordinator's shares of each layer: in memory, and what has no room there in the file."""
        shape, found = self.shape, []
        layers = self.plan.groups
        left = memory_bytes
        for layer in range(shape.n_layers):
            groups = layers[layer][0]
            fitting = len(groups)
            if left is not None:
                fitting = min(fitting, left // (shape.n_layers - layer) // shape.group_bytes(layer, 0))
            held = self._hold(layer, groups[:fitting])
            if left is not None and held is not None:
                left -= held.nbytes
            rest = self._in_place(layer, groups[fitting:])
            found.append(tuple(share for share in (held, *rest) if share is not None))
        return found

    def compute_own(self, layer: int, inputs: Floats, target: Floats, values: Floats | None = None) -> None:
        """Add the coordinator's own contribution to `target`, (n_rows, n_embd)."""
        for share in self.own[layer]:
            target += self._compute(share, inputs, values)

    @property
    def nbytes(self) -> int:
        """Memory that the shares take."""
        return sum(share.nbytes for share in self._held.values())

    def _hold(self, layer: int, groups: Iterable[int]) -> Share | None:
        key = (layer, tuple(sorted(groups)))
        if not key[1]:
            return None
        share = self._held.get(key) or self._known.get(key)
        if share is None:
            share = self._computer.share(layer, {group: self._slices.group(layer, group) for group in key[1]})
        self._held[key] = share
        return share

    def _head(self, slices: tuple[int, ...], *, hold: bool) -> tuple[Share, ...]:
        """Shares of slices of the head: in memory, or in the file, one for each run of neighbours."""
        shape = self.shape
        if not slices:
            return ()
        if hold:
            key = (shape.n_layers, slices)
            share = self._held.get(key) or self._known.get(key)
            if share is None:
                share = self._computer.head_share({n: self._slices.head_slice(n) for n in slices})
            self._held[key] = share
            return (share,)
        found = []
        start = 0
        for end in range(1, len(slices) + 1):
            if end == len(slices) or slices[end] != slices[end - 1] + 1:
                run = slices[start:end]
                share = self._computer.mapped_head(self._gguf, self._slices.head_name, run)
                self._in_file[shape.n_layers, run] = share
                found.append(share)
                start = end
        return tuple(found)

    def _in_place(self, layer: int, groups: tuple[int, ...]) -> list[Share]:
        """Shares that lie in the file; a short last group cannot and is held."""
        shape = self._slices.shape
        if not groups:
            return []
        if shape.n_ff % shape.group_size:
            held = self._hold(layer, groups)
            return [held] if held is not None else []
        share = self._computer.mapped_share(self._gguf, layer, groups)
        self._in_file[layer, groups] = share
        return [share]

    def close(self, after: PlanShares | None = None) -> None:
        """Free what the plan after it does not use; safe to call twice."""
        kept = set(map(id, after._held.values())) if after is not None else set()
        for share in (*self._held.values(), *self._in_file.values()):
            if id(share) not in kept:
                share.close()
        self._held.clear()
        self._in_file.clear()
