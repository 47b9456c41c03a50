"""Low-rank side paths of shares: what adapters add to some groups of a layer, or to some rows of the head.

On gate, up and head, ``B (s * (A x))`` is cut by rows of B; ``s * (A x)`` is the same for all shares, and is
computed once, from `x` before anything rounds it. On down, ``B (s * (A h))`` is cut by columns of A, and the
scales `s` are the same for all shares. So beside its matrices a share needs a few *side values* of each row:
``s * (A x)`` of gate, then of up, then the scales of down; for the head ``s * (A x)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.adapters import Adapters, Stack, stacks_of
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.weights import HEAD, TensorContext, allocate
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]
SideMatrices = Mapping[str, Floats]
"""Of one share: ``gate``, ``up`` and ``head`` have rows of B, (width, rank); ``down_a`` has columns of A,
(rank, width), and ``down_b`` the whole B, (n_embd, rank). Those that no adapter changes are missing."""

FFN_PARTS = ("gate", "up", "down")
HEAD_PARTS = ("head",)
MATRICES = ("gate", "up", "down_a", "down_b", "head")
MAX_RANK = 1 << 12  # of all adapters of one matrix together


def side_shape(name: str, shape: PartitionShape, width: int, rank: int) -> tuple[int, int]:
    """Of one of a share's side matrices; `width`: neurons of the share, or rows of the head."""
    if name == "down_a":
        return rank, width
    return (shape.n_embd if name == "down_b" else width), rank


def _ranks(matrices: SideMatrices, shape: PartitionShape, width: int, parts: Sequence[str]) -> dict[str, int]:
    """Rank of each part that has one.

    Raises:
        RequestError: matrices that are not these parts', do not fit together, or are not finite.
    """
    ranks = {}
    for part in parts:
        names = ("down_a", "down_b") if part == "down" else (part,)
        found = [matrices[name] for name in names if name in matrices]
        if not found:
            continue
        rank = found[0].shape[0] if part == "down" else found[0].shape[-1]
        wanted = [side_shape(name, shape, width, rank) for name in names]
        if [values.shape for values in found] != wanted or not 1 <= rank <= MAX_RANK:
            shapes = ", ".join(str(values.shape) for values in found)
            raise RequestError(
                f"side path of {part}: {shapes} for {width} columns of a model {shape.n_embd} wide"
            )
        ranks[part] = rank
    known = sum(2 if part == "down" else 1 for part in ranks)
    if not ranks or len(matrices) != known:
        raise RequestError(
            f"side paths of {', '.join(matrices) or 'nothing'}; possible are {', '.join(parts)}"
        )
    if not all(np.isfinite(values).all() for values in matrices.values()):
        raise RequestError("a side path has values that are not finite")
    return ranks


@dataclass(slots=True, eq=False)
class ShareSide:
    """The side paths of one share, as tensors. Made by `ShareComputer.side`.

    Attributes:
        ranks: of the parts that have one, in the order of their side values.
        tensors: by the names of `SideMatrices`.
    """

    ranks: dict[str, int]
    tensors: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    buffers: list[int] = field(default_factory=list)
    context: TensorContext | None = None

    @property
    def width(self) -> int:
        """Side values of a row."""
        return sum(self.ranks.values())

    def free(self) -> None:
        """Free the tensors; graphs that use them must be gone. Safe to call twice."""
        for buffer in self.buffers:
            ggml.backend_buffer_free(buffer)
        self.buffers.clear()
        if self.context is not None:
            self.context.free()
            self.context = None


def make_side(matrices: SideMatrices, shape: PartitionShape, width: int, *, head: bool) -> ShareSide:
    """The side paths of a share.

    Args:
        width: neurons of the share, or rows of the head.

    Raises:
        RequestError: matrices that do not fit. OutOfMemoryError: no memory for them.
    """
    side = ShareSide(_ranks(matrices, shape, width, HEAD_PARTS if head else FFN_PARTS))
    side.context = TensorContext(len(matrices) + 1)
    try:
        for name, values in matrices.items():
            content = np.ascontiguousarray(values, np.float32)
            buffer = allocate(ggml.backend_cpu_buffer_type(), content.nbytes, "adapters")
            side.buffers.append(buffer)
            tensor = ggml.new_tensor_2d(side.context.pointer, ggml.TYPE_F32, *reversed(content.shape))
            ggml.backend_tensor_alloc(buffer, tensor, ggml.backend_buffer_get_base(buffer))
            ggml.backend_tensor_set(tensor, content.ctypes.data, 0, content.nbytes)
            side.tensors[name] = tensor
            side.nbytes += content.nbytes
    except BaseException:
        side.free()
        raise
    return side


class SidesInGraph(NamedTuple):
    """The side paths of a graph in the making.

    Attributes:
        tensors: by the names of `SideMatrices`.
        values: inputs [rank, n_rows] with each part's side values.
    """

    context: int
    tensors: Mapping[str, int]
    values: Mapping[str, int]

    def added(self, part: str, product: int) -> int:
        """The product of gate, up or head, with its side path; as contiguous as it was."""
        if part not in self.values:
            return product
        side = ggml.mul_mat(self.context, self.tensors[part], self.values[part])
        result: int = ggml.add(
            self.context, ggml.reshape_2d(self.context, side, *ggml.extents(product)), product
        )
        return result

    def added_down(self, product: int, activation: int) -> int:
        """The product of down and `activation` [width, n_rows], with its side path."""
        if "down" not in self.values:
            return product
        low = ggml.mul_mat(self.context, self.tensors["down_a"], activation)
        low = ggml.mul(self.context, low, self.values["down"])
        side = ggml.mul_mat(self.context, self.tensors["down_b"], low)
        result: int = ggml.add(self.context, product, side)
        return result


class SideStacks:
    """What some adapters change of a model's FFNs and head: to be cut for shares, and its side values.

    Args:
        adapters: checked; what they change of attention is not looked at.
    """

    def __init__(self, adapters: Adapters, shape: PartitionShape) -> None:
        self.names = frozenset(adapters)
        self._shape = shape
        stacks = stacks_of(adapters)
        self._layers: dict[int, dict[str, Stack]] = {}
        for layer in range(shape.n_layers):
            found = {part: stacks.get(f"blk.{layer}.ffn_{part}.weight") for part in FFN_PARTS}
            self._layers[layer] = {part: stack for part, stack in found.items() if stack is not None}
        self._layers[shape.n_layers] = {"head": stacks[HEAD]} if HEAD in stacks else {}

    @property
    def layers(self) -> list[int]:
        """Those that have side paths; the number of layers stands for the head."""
        return [layer for layer, parts in self._layers.items() if parts]

    def width(self, layer: int) -> int:
        """Side values of a row of a layer; 0 where it has no side path."""
        return sum(stack.rank for stack in self._layers[layer].values())

    def matrices(self, layer: int, ids: Sequence[int]) -> SideMatrices:
        """Cut for these groups, or slices of the head, in this order; empty where there is no side path."""
        shape = self._shape
        is_head = layer == shape.n_layers
        size = shape.head_slice_rows if is_head else shape.group_size
        count = shape.slice_rows if is_head else shape.neurons
        chosen = np.concatenate([np.arange(n * size, n * size + count(n)) for n in ids])
        found: dict[str, Floats] = {}
        for part, stack in self._layers[layer].items():
            if part == "down":
                found["down_a"], found["down_b"] = stack.a()[:, chosen], stack.b()
            else:
                found[part] = stack.b()[chosen]
        return found

    def projection(self, layer: int) -> Floats | None:
        """A of gate and up, or of the head, (rank, n_embd); None where only down has a side path."""
        parts = [stack.a() for part, stack in self._layers[layer].items() if part != "down"]
        return np.concatenate(parts) if parts else None

    def values(self, layer: int, projected: Floats | None, strengths: Mapping[str, Floats]) -> Floats | None:
        """Side values (n_rows, width) of a layer; None where nothing is switched on.

        Args:
            projected: what `projection` makes of the layer's inputs, (n_rows, rank).
            strengths: adapter -> (n_rows,).
        """
        n_rows = len(next(iter(strengths.values()))) if strengths else 0
        parts = self._layers[layer]
        scales = [stack.scales(strengths, n_rows) for stack in parts.values()]
        if not any(scale.any() for scale in scales):
            return None
        found = np.concatenate(scales, axis=1)
        if projected is not None:
            found[:, : projected.shape[1]] *= projected  # down's scales come last
        return found
