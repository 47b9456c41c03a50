"""The neuron groups that a worker holds in memory for one model, by plan."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import PLAN_MASK, Inputs, RefusalReason, RefusedError
from edge_runtime.cluster.manifest import Wanted
from edge_runtime.cluster.shard_fetch import ReadyShard
from edge_runtime.engine.activations import decode, kernel_form
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.shares import Share, ShareComputer
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

_Shares = dict[int, Share]  # by layer
_MAX_PLANS = 2  # the one in force and the one to come


class HeldShares:
    """One model's shares. `compute` is called by one thread; everything else from any.

    Args:
        backend: to compute with; shared with other models.
    """

    def __init__(self, shape: PartitionShape, backend: Backend) -> None:
        self.shape = shape
        self._computer = ShareComputer(shape, backend)
        self._forms = [kernel_form(gate) for gate, _, _ in shape.types] + [kernel_form(shape.head_type)]
        self._lock = threading.Lock()
        self._plans: dict[int, _Shares] = {}
        self._released: list[Share] = []  # to be freed by the thread that computes

    def missing(self, wanted: Wanted) -> dict[int, tuple[int, ...]]:
        """Of what a plan wants, the layers whose share is not held as it is."""
        held = self._held()
        whole = {layer: tuple(sorted(numbers)) for layer, numbers in wanted.items() if numbers}
        return {layer: numbers for layer, numbers in whole.items() if (layer, numbers) not in held}

    def load(self, plan: int, wanted: Wanted, ready: Iterable[ReadyShard]) -> None:
        """Make a plan's shares: from what is held, and from shards as they arrive.

        Raises:
            OutOfMemoryError: they do not fit.
            RequestError: shards do not fit the model, or are not all that were wanted.
        """
        held = self._held()
        missing = self.missing(wanted)
        shares = {
            layer: held[layer, tuple(sorted(numbers))]
            for layer, numbers in wanted.items()
            if numbers and layer not in missing
        }
        made: list[Share] = []
        arrived: dict[int, dict[int, bytes]] = defaultdict(dict)
        try:
            for layer, number, content in ready:
                arrived[layer][number] = content
                if len(arrived[layer]) == len(missing[layer]):
                    shares[layer] = self._make(layer, arrived.pop(layer))
                    made.append(shares[layer])
            if arrived or len(shares) != sum(bool(numbers) for numbers in wanted.values()):
                raise RequestError("not all shards of the plan arrived")
        except BaseException:
            for share in made:
                share.close()
            raise
        with self._lock:
            self._plans.pop(plan & PLAN_MASK, None)
            self._plans[plan & PLAN_MASK] = shares
            while len(self._plans) > _MAX_PLANS:
                self._drop_oldest()

    def _make(self, layer: int, contents: Mapping[int, bytes]) -> Share:
        if layer == self.shape.n_layers:
            return self._computer.head_share(contents)
        return self._computer.share(layer, contents)

    def release_before(self, plan: int) -> None:
        """Free what only other plans than this one hold: there is no memory for two."""
        with self._lock:
            for other in [number for number in self._plans if number != plan & PLAN_MASK]:
                self._drop(other)

    def _held(self) -> dict[tuple[int, tuple[int, ...]], Share]:
        with self._lock:
            return {(layer, s.ids): s for shares in self._plans.values() for layer, s in shares.items()}

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._plans)))

    def _drop(self, plan: int) -> None:
        dropped = self._plans.pop(plan)
        kept = {id(share) for shares in self._plans.values() for share in shares.values()}
        self._released += [share for share in dropped.values() if id(share) not in kept]

    def compute(self, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        """A contribution, (n_rows, n_embd), or logits of the head's slices held, (n_rows, rows).

        The result is overwritten by the next call.

        Raises:
            RefusedError: the plan or the layer is not held, or the inputs are not what the layer takes.
        """
        with self._lock:
            shares = self._plans.get(plan)
            if shares is not None and len(self._plans) > 1 and next(reversed(self._plans)) == plan:
                self._drop_oldest()  # a plan that is asked for has replaced the one before
            released, self._released = self._released, []
        for unused in released:
            unused.close()
        share = shares.get(layer) if shares is not None else None
        if share is None:
            raise RefusedError(RefusalReason.PLAN)
        try:
            values = decode(self._forms[layer], inputs, n_rows, self.shape.n_embd)
        except RequestError as error:
            raise RefusedError(RefusalReason.INVALID) from error
        return self._computer.compute(share, values)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Neuron groups, head slices and bytes in memory."""
        groups = slices = size = 0
        for (layer, ids), share in self._held().items():
            if layer == self.shape.n_layers:
                slices += len(ids)
            else:
                groups += len(ids)
            size += share.nbytes
        return groups, slices, size

    def close(self) -> None:
        """Free everything; nothing may be computing. Safe to call twice."""
        with self._lock:
            while self._plans:
                self._drop_oldest()
            released, self._released = self._released, []
        for share in released:
            share.close()
        self._computer.close()
