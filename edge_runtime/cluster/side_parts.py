"""Side paths on their way to a worker: a version's matrices in messages of a bounded size, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from edge_runtime.cluster.prepared_adapters import PreparedAdapters
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.share_sides import FFN_PARTS, HEAD_PARTS, MAX_RANK, Floats, SideMatrices, side_shape
from edge_runtime.errors import OutOfMemoryError, RequestError
from edge_runtime.v1 import cluster_pb2 as wire

MESSAGE_BYTES = 2 << 20  # of matrices in a message
_PARTS_A_MESSAGE = 1024
_NUMBERS = {
    "gate": wire.SIDE_MATRIX_GATE,
    "up": wire.SIDE_MATRIX_UP,
    "down_a": wire.SIDE_MATRIX_DOWN_A,
    "down_b": wire.SIDE_MATRIX_DOWN_B,
    "head": wire.SIDE_MATRIX_HEAD,
}
_NAMES: dict[int, str] = {number: name for name, number in _NUMBERS.items()}


def messages_for(
    model: str, prepared: PreparedAdapters, worker: int
) -> Iterator[wire.PrepareAdaptersRequest]:
    """What gives a worker its part of a version; nothing where it has none.

    Args:
        model: SHA-256 of the manifest.
    """
    parts: list[wire.SidePart] = []
    size = 0

    def message() -> wire.PrepareAdaptersRequest:
        return wire.PrepareAdaptersRequest(
            model=model, plan=prepared.shares.plan.number, version=prepared.version, parts=parts
        )

    for layer in prepared.layers:
        for name, values in prepared.matrices(layer, worker).items():
            content = np.ascontiguousarray(values, "<f4").tobytes()
            rank = values.shape[0] if name == "down_a" else values.shape[1]
            for start in range(0, len(content), MESSAGE_BYTES):
                piece = content[start : start + MESSAGE_BYTES]
                if parts and (size + len(piece) > MESSAGE_BYTES or len(parts) >= _PARTS_A_MESSAGE):
                    yield message()
                    parts, size = [], 0
                parts.append(wire.SidePart(layer=layer, matrix=_NUMBERS[name], rank=rank, content=piece))
                size += len(piece)
    if parts:
        yield message()


class SideParts:
    """Collects the messages of one call.

    Args:
        first: of them.
        widths: layer -> neurons that this device holds of it under the plan, or rows of the head.
        most_bytes: that the matrices may have.
    """

    def __init__(
        self,
        first: wire.PrepareAdaptersRequest,
        shape: PartitionShape,
        widths: Mapping[int, int],
        most_bytes: int,
    ) -> None:
        self.model, self.plan, self.version = first.model, first.plan, first.version
        self._shape = shape
        self._widths = widths
        self._most_bytes = most_bytes
        self._contents: dict[tuple[int, str], bytearray] = {}
        self._ranks: dict[tuple[int, str], int] = {}
        self.nbytes = 0

    def add(self, request: wire.PrepareAdaptersRequest) -> None:
        """Take in a message.

        Raises:
            RequestError: it belongs to another call, or to no matrix of what this device holds.
            OutOfMemoryError: it is more than this device lends.
        """
        if (request.model, request.plan, request.version) != (self.model, self.plan, self.version):
            raise RequestError("the messages of a call are of one model, one plan and one version")
        for part in request.parts:
            self._add(part)

    def _add(self, part: wire.SidePart) -> None:
        name = _NAMES.get(part.matrix, "")
        width = self._widths.get(part.layer)
        known = HEAD_PARTS if part.layer == self._shape.n_layers else FFN_PARTS
        if width is None or name.removesuffix("_a").removesuffix("_b") not in known:
            raise RequestError(
                f"a side path of layer {part.layer}, matrix {part.matrix}: nothing of it is held under plan "
                f"{self.plan}"
            )
        if not 1 <= part.rank <= MAX_RANK:
            raise RequestError(f"a side path of rank {part.rank}; possible are 1 to {MAX_RANK}")
        self.nbytes += len(part.content)
        if self.nbytes > self._most_bytes:
            raise OutOfMemoryError(
                f"side paths of more than {max(self._most_bytes, 0) / 1e6:.1f} MB, for which this device has "
                "room: set [cluster] lend_memory_mb higher, or apply fewer adapters"
            )
        key = part.layer, name
        content = self._contents.setdefault(key, bytearray())
        content += part.content
        wanted = 4 * prod(side_shape(name, self._shape, width, part.rank))
        if self._ranks.setdefault(key, part.rank) != part.rank or len(content) > wanted:
            raise RequestError(
                f"a side path of layer {part.layer}, {name}: {len(content)} bytes, not {wanted}"
            )

    def matrices(self) -> dict[int, SideMatrices]:
        """Layer -> its matrices.

        Raises:
            RequestError: one is not complete.
        """
        found: dict[int, dict[str, Floats]] = {}
        for (layer, name), content in self._contents.items():
            size = side_shape(name, self._shape, self._widths[layer], self._ranks[layer, name])
            if len(content) != 4 * prod(size):
                raise RequestError(
                    f"a side path of layer {layer}, {name}: {len(content)} bytes, not {4 * prod(size)}"
                )
            found.setdefault(layer, {})[name] = np.frombuffer(content, "<f4").astype(np.float32).reshape(size)
        return dict(found)
