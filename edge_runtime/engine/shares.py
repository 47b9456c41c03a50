"""Some neuron groups of a layer, or some rows of the head, as small dense matrices of their own.

A share multiplies as fast as the whole FFN does, in proportion to its width: its groups' rows and columns
are laid side by side in the layout of the fastest kernels. What a share gives, added to what the shares of
all other groups give, is the FFN's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import as_array, swiglu_parts
from edge_runtime.engine.group_slices import PartitionShape
from edge_runtime.engine.share_sides import ShareSide, SideMatrices, SidesInGraph, make_side
from edge_runtime.engine.weights import INTERLEAVED, RepackedTypes, TensorContext, address_of, allocate
from edge_runtime.errors import OutOfMemoryError, RequestError

Floats = NDArray[np.float32]

_N_NODES = 48
_MAX_GRAPHS = 16  # of one share: as many batch sizes, with side paths and without


@dataclass(slots=True, eq=False)
class _Graph:
    """A share's graph for one number of rows; `inputs`, `output` and `sides` are its tensors' memory."""

    context: TensorContext
    graph_context: int
    pointer: int
    inputs: Floats
    output: Floats
    chosen: NDArray[np.int32] | None  # where the share's groups are named, before each run
    sides: list[Floats]  # side values of each part, (n_rows, rank)
    generation: int

    def free(self) -> None:
        ggml.free(self.graph_context)
        self.context.free()


@dataclass(slots=True, eq=False)
class Share:
    """Matrices of one share. `ids` names its groups (of the head: its slices), in ascending order.

    Attributes:
        layer: whose groups; the number of layers stands for the head.
        nbytes: memory it takes; 0 for one that lies in the model's file.
        width: values of a row of the output.
    """

    layer: int
    ids: tuple[int, ...]
    width: int
    nbytes: int = 0
    matrices: dict[str, int] = field(default_factory=dict)
    in_file: bool = False  # the matrices hold all of the layer's groups
    buffers: list[int] = field(default_factory=list)
    context: TensorContext | None = None
    graphs: dict[tuple[int, ShareSide | None], _Graph] = field(default_factory=dict)

    def drop_side(self, side: ShareSide) -> None:
        """Free a side path of this share, and the graphs that use it; safe to call twice."""
        for key in [key for key in self.graphs if key[1] is side]:
            self.graphs.pop(key).free()
        side.free()

    def close(self) -> None:
        """Free it; safe to call twice."""
        for graph in self.graphs.values():
            graph.free()
        self.graphs.clear()
        for buffer in self.buffers:
            ggml.backend_buffer_free(buffer)
        self.buffers.clear()
        if self.context is not None:
            self.context.free()


class ShareComputer:
    """Makes shares of one model and computes them. Use it from one thread at a time.

    Args:
        backend: to compute with; a worker that has no model of its own makes one.

    Raises:
        OutOfMemoryError: ggml could not start.
    """

    def __init__(self, shape: PartitionShape, backend: Backend) -> None:
        self.shape = shape
        self._backend = backend
        self._repacked = RepackedTypes()
        self._allocator: int = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        if not self._allocator:
            raise OutOfMemoryError("no memory to start the CPU backend")
        self._buffer_bytes = 0
        self._generation = 0

    # --- making shares ------------------------------------------------------------------------

    def share(self, layer: int, groups: Mapping[int, bytes]) -> Share:
        """The share of these groups; their bytes as `GroupSlices.group` gives them.

        Raises:
            RequestError: a layer or group that the model does not have, or another number of bytes.
            OutOfMemoryError: it does not fit.
        """
        shape = self.shape
        ids = tuple(sorted(groups))
        if not ids or not 0 <= layer < shape.n_layers or ids[0] < 0 or ids[-1] >= shape.n_groups:
            raise RequestError(f"groups {ids[:1]}..{ids[-1:]} of layer {layer}: the model has no such groups")
        gates, ups, downs = [], [], []
        for group in ids:
            content = np.frombuffer(groups[group], np.uint8)
            if content.size != shape.group_bytes(layer, group):
                raise RequestError(
                    f"group {group} of layer {layer} has {content.size} bytes; needed are "
                    f"{shape.group_bytes(layer, group)}"
                )
            gate, up, _ = shape.matrix_bytes(layer, group)
            gates.append(content[:gate].reshape(shape.neurons(group), -1))
            ups.append(content[gate : gate + up].reshape(shape.neurons(group), -1))
            downs.append(content[gate + up :].reshape(shape.n_embd, -1))
        share = Share(layer, ids, shape.n_embd, context=TensorContext(8))
        try:
            self._add_gate_up(share, np.concatenate(gates), np.concatenate(ups))
            width = sum(map(shape.neurons, ids))
            self._add(share, "down", shape.types[layer][2], width, np.concatenate(downs, axis=1))
        except BaseException:
            share.close()
            raise
        return share

    def _add_gate_up(self, share: Share, gate: NDArray[np.uint8], up: NDArray[np.uint8]) -> None:
        gate_type, up_type, _ = self.shape.types[share.layer]
        n_rows = len(gate)
        if gate_type != up_type or n_rows % INTERLEAVED:
            self._add(share, "gate", gate_type, self.shape.n_embd, gate)
            self._add(share, "up", up_type, self.shape.n_embd, up)
            return
        blocks = (n_rows // INTERLEAVED, 1, INTERLEAVED, gate.shape[1])
        both = np.concatenate([gate.reshape(blocks), up.reshape(blocks)], axis=1)
        self._add(share, "gate_up", gate_type, self.shape.n_embd, both.reshape(2 * n_rows, -1))

    def head_share(self, slices: Mapping[int, bytes]) -> Share:
        """The share of these slices of the head; their bytes as `GroupSlices.head_slice` gives them.

        Raises:
            RequestError: a slice that the model does not have, or another number of bytes.
            OutOfMemoryError: it does not fit.
        """
        shape = self.shape
        ids = tuple(sorted(slices))
        if not ids or ids[0] < 0 or ids[-1] >= shape.n_head_slices:
            raise RequestError(f"slices {ids[:1]}..{ids[-1:]} of the head: it has {shape.n_head_slices}")
        for number in ids:
            if len(slices[number]) != shape.head_slice_bytes(number):
                raise RequestError(
                    f"slice {number} of the head has {len(slices[number])} bytes; needed are "
                    f"{shape.head_slice_bytes(number)}"
                )
        width = sum(map(shape.slice_rows, ids))
        share = Share(shape.n_layers, ids, width, context=TensorContext(4))
        rows = np.frombuffer(b"".join(slices[number] for number in ids), np.uint8).reshape(width, -1)
        try:
            self._add(share, "head", shape.head_type, shape.n_embd, rows)
        except BaseException:
            share.close()
            raise
        return share

    def mapped_share(self, gguf: GGUFFile, layer: int, groups: tuple[int, ...]) -> Share:
        """The share of these groups in place in the model's file: it takes no memory, and more time.

        Raises:
            RequestError: the model's last group is shorter than the others.
        """
        shape = self.shape
        if shape.n_groups * shape.group_size != shape.n_ff:
            raise RequestError(f"the last of {shape.n_groups} groups is short; read the groups instead")
        share = Share(layer, groups, shape.n_embd, in_file=True, context=TensorContext(16))
        assert share.context is not None
        context = share.context.pointer
        for name, type_ in zip(("gate", "up", "down"), shape.types[layer], strict=True):
            content = gguf.tensor_bytes(f"blk.{layer}.ffn_{name}.weight")
            buffer = ggml.backend_cpu_buffer_from_ptr(address_of(content), len(content))
            share.buffers.append(buffer)
            width, n_rows = (shape.n_ff, shape.n_embd) if name == "down" else (shape.n_embd, shape.n_ff)
            whole = ggml.new_tensor_2d(context, type_, width, n_rows)
            ggml.backend_tensor_alloc(buffer, whole, ggml.backend_buffer_get_base(buffer))
            row = int(ggml.row_size(type_, width))
            size = shape.group_size
            if name == "down":
                step = int(ggml.row_size(type_, size))
                view = ggml.view_3d(context, whole, size, n_rows, shape.n_groups, row, step, 0)
            else:
                view = ggml.view_3d(context, whole, width, size, shape.n_groups, row, row * size, 0)
            ggml.backend_view_init(view)
            share.matrices[name] = view
        return share

    def mapped_head(self, gguf: GGUFFile, name: str, slices: tuple[int, ...]) -> Share:
        """The share of these slices of the head in place in the model's file; they must be neighbours.

        Args:
            name: of the head's tensor.
        """
        shape = self.shape
        width = sum(map(shape.slice_rows, slices))
        share = Share(shape.n_layers, slices, width, in_file=True, context=TensorContext(2))
        assert share.context is not None
        row = int(ggml.row_size(shape.head_type, shape.n_embd))
        start = slices[0] * shape.head_slice_rows * row
        content = gguf.tensor_bytes(name)[start : start + width * row]
        buffer = ggml.backend_cpu_buffer_from_ptr(address_of(content), len(content))
        share.buffers.append(buffer)
        matrix = ggml.new_tensor_2d(share.context.pointer, shape.head_type, shape.n_embd, width)
        ggml.backend_tensor_alloc(buffer, matrix, ggml.backend_buffer_get_base(buffer))
        share.matrices["head"] = matrix
        return share

    def projection(self, a: Floats) -> Share:
        """What multiplies a layer's inputs by ``a`` (rank, n_embd), as a share of no layer.

        Raises:
            OutOfMemoryError: it does not fit.
        """
        share = Share(-1, (), len(a), context=TensorContext(2))
        content = np.ascontiguousarray(a, np.float32).view(np.uint8)
        try:
            self._add(share, "head", ggml.TYPE_F32, self.shape.n_embd, content)
        except BaseException:
            share.close()
            raise
        return share

    def side(self, share: Share, matrices: SideMatrices) -> ShareSide:
        """Side paths of a share; free them with `Share.drop_side`.

        Raises:
            RequestError: they do not fit the share. OutOfMemoryError: no memory for them.
        """
        is_head = share.layer == self.shape.n_layers
        width = share.width if is_head else sum(map(self.shape.neurons, share.ids))
        return make_side(matrices, self.shape, width, head=is_head)

    def _add(self, share: Share, name: str, type_: int, width: int, rows: NDArray[np.uint8]) -> None:
        """Store a matrix of `width` columns, repacked where the CPU has kernels for it."""
        rows = np.ascontiguousarray(rows)
        repacked = self._repacked.takes(type_, len(rows))
        kind = self._repacked.buffer_type if repacked else ggml.backend_cpu_buffer_type()
        buffer = allocate(int(kind or 0), rows.nbytes + 64, "neuron groups")
        share.buffers.append(buffer)
        assert share.context is not None
        tensor = ggml.new_tensor_2d(share.context.pointer, type_, width, len(rows))
        ggml.backend_tensor_alloc(buffer, tensor, ggml.backend_buffer_get_base(buffer))
        ggml.backend_tensor_set(tensor, rows.ctypes.data, 0, rows.nbytes)
        share.matrices[name] = tensor
        share.nbytes += rows.nbytes

    # --- computing ----------------------------------------------------------------------------

    def compute(
        self, share: Share, inputs: Floats, side: ShareSide | None = None, values: Floats | None = None
    ) -> Floats:
        """What the share contributes, (n_rows, width), for the layer's normalised inputs (n_rows, n_embd).

        The result is overwritten by the next call.

        Args:
            side: of the share; None: without side paths.
            values: (n_rows, side.width), the rows' side values.
        """
        n_rows = len(inputs)
        graph = share.graphs.get((n_rows, side))
        if graph is None or graph.generation != self._generation:
            graph = self._build(share, n_rows, side)
        graph.inputs[:] = inputs
        if graph.chosen is not None:
            graph.chosen[:] = share.ids
        if side is not None:
            assert values is not None
            start = 0
            for target in graph.sides:
                stop = start + target.shape[1]
                target[:] = values[:, start:stop]
                start = stop
        self._backend.compute(graph.pointer)
        return graph.output

    def _build(self, share: Share, n_rows: int, side: ShareSide | None) -> _Graph:
        stale = share.graphs.pop((n_rows, side), None)
        if stale is None and len(share.graphs) >= _MAX_GRAPHS:
            stale = share.graphs.pop(next(iter(share.graphs)))
        if stale is not None:
            stale.free()
        context = TensorContext(_N_NODES)
        graph_context = ggml.init(ggml.InitParams(ggml.graph_overhead_custom(_N_NODES, False), None, True))
        pointer = ggml.new_graph_custom(graph_context, _N_NODES, False)
        ctx = context.pointer
        inputs = self._input(ctx, ggml.TYPE_F32, self.shape.n_embd, n_rows)
        ranks = side.ranks if side is not None else {}
        parts = {part: self._input(ctx, ggml.TYPE_F32, rank, n_rows) for part, rank in ranks.items()}
        sides = SidesInGraph(ctx, side.tensors if side is not None else {}, parts)
        ids = 0
        if "head" in share.matrices:
            output = sides.added("head", ggml.mul_mat(ctx, share.matrices["head"], inputs))
        elif share.in_file:
            ids = self._input(ctx, ggml.TYPE_I32, len(share.ids), n_rows)
            output = self._chosen_groups(ctx, share, inputs, ids, n_rows, sides)
        else:
            output = self._ffn(ctx, share, inputs, n_rows, sides)
        ggml.set_output(output)
        ggml.build_forward_expand(pointer, output)
        if not ggml.gallocr_alloc_graph(self._allocator, pointer):
            raise OutOfMemoryError(f"no memory to compute {n_rows} tokens of a share at once")
        size = int(ggml.gallocr_get_buffer_size(self._allocator, 0))
        if size > self._buffer_bytes:
            # The shared buffer grew and moved: graphs built before point into the old one.
            self._buffer_bytes = size
            self._generation += 1
        graph = _Graph(
            context,
            graph_context,
            pointer,
            as_array(inputs, np.float32, (n_rows, self.shape.n_embd)),
            as_array(output, np.float32, (n_rows, share.width)),
            as_array(ids, np.int32, (n_rows, len(share.ids))) if ids else None,
            [as_array(parts[part], np.float32, (n_rows, rank)) for part, rank in ranks.items()],
            self._generation,
        )
        share.graphs[n_rows, side] = graph
        return graph

    @staticmethod
    def _input(ctx: int, type_: int, width: int, n_rows: int) -> int:
        tensor: int = ggml.new_tensor_2d(ctx, type_, width, n_rows)
        ggml.set_input(tensor)
        return tensor

    def _ffn(self, ctx: int, share: Share, inputs: int, n_rows: int, sides: SidesInGraph) -> int:
        width = sum(map(self.shape.neurons, share.ids))
        both = share.matrices.get("gate_up")
        if both is not None:
            gate, up = swiglu_parts(ctx, ggml.mul_mat(ctx, both, inputs), width * n_rows)
        else:
            gate, up = (ggml.mul_mat(ctx, share.matrices[name], inputs) for name in ("gate", "up"))
        gate, up = sides.added("gate", gate), sides.added("up", up)
        activation = ggml.reshape_2d(ctx, ggml.swiglu_split(ctx, gate, up), width, n_rows)
        return sides.added_down(ggml.mul_mat(ctx, share.matrices["down"], activation), activation)

    def _chosen_groups(
        self, ctx: int, share: Share, inputs: int, ids: int, n_rows: int, sides: SidesInGraph
    ) -> int:
        n_embd, size, count = self.shape.n_embd, self.shape.group_size, len(share.ids)
        expanded = ggml.reshape_3d(ctx, inputs, n_embd, 1, n_rows)
        gate, up = (
            ggml.reshape_2d(
                ctx, ggml.mul_mat_id(ctx, share.matrices[name], expanded, ids), count * size, n_rows
            )
            for name in ("gate", "up")
        )
        gate, up = sides.added("gate", gate), sides.added("up", up)
        flat = ggml.swiglu_split(ctx, gate, up)
        activation = ggml.reshape_3d(ctx, flat, size, count, n_rows)
        parts = ggml.mul_mat_id(ctx, share.matrices["down"], activation, ids)  # [n_embd, count, n_rows]
        target = ggml.new_tensor_3d(ctx, ggml.TYPE_F32, n_embd, 1, n_rows)
        summed = ggml.reshape_2d(ctx, ggml.repeat_back(ctx, parts, target), n_embd, n_rows)
        return sides.added_down(summed, flat)

    def close(self) -> None:
        """Free the graphs' memory; shares must be closed before. Safe to call twice."""
        if self._allocator:
            ggml.gallocr_free(self._allocator)
            self._allocator = 0
