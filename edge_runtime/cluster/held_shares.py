"""The neuron groups that a worker holds in memory for one model, by plan."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.cluster.exchange import ADAPTERS_VERSION, PLAN_MASK, Inputs, RefusalReason, RefusedError
from edge_runtime.cluster.manifest import Wanted
from edge_runtime.cluster.shard_fetch import ReadyShard
from edge_runtime.engine.activations import decode, encoded_bytes, kernel_form
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.share_sides import ShareSide, SideMatrices
from edge_runtime.engine.shares import Share, ShareComputer
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]

_Shares = dict[int, Share]  # by layer
_Sides = dict[int, ShareSide]  # by layer
_MAX_PLANS = _MAX_VERSIONS = 2  # the one in force and the one to come


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
        self._sides: dict[int, dict[int, _Sides]] = {}  # by plan and version of the adapters
        # To be freed by the thread that computes: a share, or one of its side paths.
        self._released: list[tuple[Share, ShareSide | None]] = []

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
            number = plan & PLAN_MASK
            self._drop_sides(number)
            replaced = self._plans.pop(number, {})
            self._plans[number] = shares
            self._release(replaced)
            while len(self._plans) > _MAX_PLANS:
                self._drop_oldest()

    def _make(self, layer: int, contents: Mapping[int, bytes]) -> Share:
        if layer == self.shape.n_layers:
            return self._computer.head_share(contents)
        return self._computer.share(layer, contents)

    def widths(self, plan: int) -> dict[int, int]:
        """Layer -> neurons held of it under a plan; of the head, rows.

        Raises:
            RequestError: no such plan is held.
        """
        with self._lock:
            shares = self._plans.get(plan & PLAN_MASK)
        if shares is None:
            raise RequestError(f"plan {plan} is not prepared here; prepare it first")
        neurons = self.shape.neurons
        return {
            layer: share.width if layer == self.shape.n_layers else sum(map(neurons, share.ids))
            for layer, share in shares.items()
        }

    def load_adapters(self, plan: int, version: int, matrices: Mapping[int, SideMatrices]) -> int:
        """Make a version's side paths for a plan's shares; returns their bytes.

        Raises:
            RequestError: the plan is not held, or they do not fit its shares.
            OutOfMemoryError: no memory for them.
        """
        plan &= PLAN_MASK
        with self._lock:
            shares = self._plans.get(plan)
        made: _Sides = {}
        try:
            for layer, of_layer in matrices.items():
                share = shares.get(layer) if shares is not None else None
                if share is None:
                    raise RequestError(f"nothing of layer {layer} is held under plan {plan}")
                made[layer] = self._computer.side(share, of_layer)
            with self._lock:
                if self._plans.get(plan) is not shares:
                    raise RequestError(f"plan {plan} was replaced meanwhile; prepare its adapters again")
                versions = self._sides.setdefault(plan, {})
                self._drop_version(plan, version)
                versions[version] = made
                while len(versions) > _MAX_VERSIONS:
                    self._drop_version(plan, next(iter(versions)))
        except BaseException:
            for side in made.values():
                side.free()  # no graph has used them
            raise
        return sum(side.nbytes for side in made.values())

    def _drop_version(self, plan: int, version: int) -> None:
        for layer, side in self._sides.get(plan, {}).pop(version, {}).items():
            self._released.append((self._plans[plan][layer], side))

    def _drop_sides(self, plan: int) -> None:
        for version in list(self._sides.get(plan, {})):
            self._drop_version(plan, version)
        self._sides.pop(plan, None)

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
        self._drop_sides(plan)
        self._release(self._plans.pop(plan))

    def _release(self, dropped: _Shares) -> None:
        """Have shares freed that no plan has any more."""
        kept = {id(share) for shares in self._plans.values() for share in shares.values()}
        self._released += [(share, None) for share in dropped.values() if id(share) not in kept]

    def compute(self, plan: int, layer: int, n_rows: int, inputs: Inputs) -> Floats:
        """A contribution, (n_rows, n_embd), or logits of the head's slices held, (n_rows, rows).

        The result is overwritten by the next call.

        Raises:
            RefusedError: the plan, the layer or the version of the adapters is not held, or the inputs are
                not what the layer takes.
        """
        with self._lock:
            shares = self._plans.get(plan)
            if shares is not None and len(self._plans) > 1 and next(reversed(self._plans)) == plan:
                self._drop_oldest()  # a plan that is asked for has replaced the one before
        self._free_released()
        share = shares.get(layer) if shares is not None else None
        if share is None:
            raise RefusedError(RefusalReason.PLAN)
        form, content = self._forms[layer], memoryview(inputs)
        end = self.input_bytes(layer, n_rows)
        side, values = self._side(plan, layer, n_rows, content[end:])
        try:
            hidden = decode(form, content[:end], n_rows, self.shape.n_embd)
        except RequestError as error:
            raise RefusedError(RefusalReason.INVALID) from error
        return self._computer.compute(share, hidden, side, values)

    def input_bytes(self, layer: int, n_rows: int) -> int:
        """Bytes of a request's inputs, before what adapters add."""
        return encoded_bytes(self._forms[layer], n_rows, self.shape.n_embd)

    def _side(
        self, plan: int, layer: int, n_rows: int, content: memoryview
    ) -> tuple[ShareSide | None, Floats | None]:
        """The side path that a request names, and its side values (n_rows, width)."""
        if not content:
            return None, None
        if len(content) < ADAPTERS_VERSION.size:
            raise RefusedError(RefusalReason.INVALID)
        (version,) = ADAPTERS_VERSION.unpack_from(content)
        with self._lock:
            versions = self._sides.get(plan, {})
            found = versions.get(version)
            if found is not None and next(reversed(versions)) == version:
                for other in list(versions)[:-1]:  # a version that is asked for has replaced the one before
                    self._drop_version(plan, other)
        self._free_released()
        if found is None:
            raise RefusedError(RefusalReason.ADAPTERS)
        side, values = found.get(layer), content[ADAPTERS_VERSION.size :]
        if side is None or len(values) != 4 * n_rows * side.width:
            raise RefusedError(RefusalReason.INVALID)
        return side, np.frombuffer(values, "<f4").reshape(n_rows, side.width)

    def _free_released(self) -> None:
        """Free what nothing uses any more; by the thread that computes."""
        if not self._released:
            return
        with self._lock:
            released, self._released = self._released, []
        for share, side in released:
            if side is not None:
                share.drop_side(side)
            else:
                share.close()

    @property
    def counts(self) -> tuple[int, int, int]:
        """Neuron groups, head slices and bytes of their weights in memory."""
        groups = slices = size = 0
        for (layer, ids), share in self._held().items():
            if layer == self.shape.n_layers:
                slices += len(ids)
            else:
                groups += len(ids)
            size += share.nbytes
        return groups, slices, size

    @property
    def side_bytes(self) -> int:
        """Bytes of side paths in memory."""
        with self._lock:
            versions = [sides for of_plan in self._sides.values() for sides in of_plan.values()]
        return sum(side.nbytes for sides in versions for side in sides.values())

    def close(self) -> None:
        """Free everything; nothing may be computing. Safe to call twice."""
        with self._lock:
            while self._plans:
                self._drop_oldest()
        self._free_released()
        self._computer.close()
