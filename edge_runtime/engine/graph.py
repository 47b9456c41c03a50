"""The forward pass of a LLaMA-family model as a ggml graph, built once for each shape and used again.

What a graph computes is fixed by its `GraphSpec`; everything that changes from step to step (tokens,
positions, cache rows, mask, ids of neuron groups, added vectors) is an input that is written before
each run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.adapters import AdapterBank
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.kv_tensors import KVTensors
from edge_runtime.engine.neuron_groups import GroupedLayer
from edge_runtime.engine.weights import EMBEDDING, HEAD, INTERLEAVED, TensorContext, Weights
from edge_runtime.errors import OutOfMemoryError

DENSE = -1
_FLOAT = 4  # bytes of an activation
_GATE_UP = ("ffn_gate", "ffn_up")

CaptureKind = Literal["residual", "ffn_input", "ffn_activation", "ffn_output"]


class Capture(NamedTuple):
    """What to read out of a forward pass.

    ``residual``: the residual stream before `layer`, (n_rows, n_embd); layer n_layers is after the last.
    ``ffn_input``: the normalised vector that the layer's gate and up multiply, (n_rows, n_embd).
    ``ffn_activation``: silu(gate) * up, what ffn_down multiplies, (n_rows, n_ff); with neuron groups
    (n_rows, n_groups_computed * group_size).
    ``ffn_output``: what the layer's FFN adds to the residual stream, (n_rows, n_embd); not where no
    group is computed.
    """

    kind: CaptureKind
    layer: int


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Everything that decides which operations a graph has.

    Attributes:
        rows: tokens in the batch.
        n_kv: KV cells that attention looks at.
        outputs: rows whose logits are computed; 0 for none.
        first, last: layers first .. last - 1 are run.
        from_hidden: the residual stream before `first` is given, instead of tokens.
        groups: for each layer run, how many neuron groups are computed, DENSE for the whole FFN.
        fills: layers that get a constant in place of the groups left out.
        additions: layers before which something is added to the residual stream (`last`: after all).
        captures: what is read out.
        adapter_version: version of the adapter bank's shapes; 0 where no side path is applied.
        head: False gives the head's input, ``head_input``, in place of logits.
    """

    rows: int
    n_kv: int
    outputs: int
    first: int
    last: int
    from_hidden: bool = False
    groups: tuple[int, ...] = ()
    fills: frozenset[int] = frozenset()
    additions: frozenset[int] = frozenset()
    captures: frozenset[Capture] = frozenset()
    adapter_version: int = 0
    head: bool = True

    def groups_of(self, layer: int) -> int:
        """Number of neuron groups computed in `layer`, or DENSE."""
        return self.groups[layer - self.first] if self.groups else DENSE


@dataclass(slots=True)
class GraphParts:
    """What the graphs of one model share."""

    hyperparameters: Hyperparameters
    weights: Weights
    kv: KVTensors
    grouped: list[GroupedLayer] = field(default_factory=list)
    adapters: AdapterBank | None = None


class Graph:
    """One built graph. `inputs` and `outputs` are numpy views of its tensors' memory."""

    def __init__(self, parts: GraphParts, spec: GraphSpec, allocator: int) -> None:
        self.spec = spec
        n_nodes = (spec.last - spec.first) * 96 + 64
        self._context = TensorContext(n_nodes + 16)
        self._graph_context = ggml.init(
            ggml.InitParams(ggml.graph_overhead_custom(n_nodes, False), None, True)
        )
        self.pointer: int = ggml.new_graph_custom(self._graph_context, n_nodes, False)
        builder = _Builder(parts, spec, self._context.pointer, self.pointer)
        builder.build()
        # A plan of its own: the allocator would take over that of a graph with the same nodes, and give the
        # memory of what is read out here, but was not there, to something else.
        if not (
            ggml.gallocr_reserve(allocator, self.pointer)
            and ggml.gallocr_alloc_graph(allocator, self.pointer)
        ):
            self.free()
            raise OutOfMemoryError(
                f"no memory to compute {spec.rows} tokens at once; load the model with a smaller batch"
            )
        self.inputs = {name: as_array(tensor, *shape) for name, (tensor, shape) in builder.inputs.items()}
        self.outputs = {name: as_array(tensor, *shape) for name, (tensor, shape) in builder.outputs.items()}

    def free(self) -> None:
        """Free the graph's descriptions; its arrays must not be used any more."""
        if self._graph_context:
            ggml.free(self._graph_context)
            self._graph_context = 0
            self._context.free()


_Shaped = tuple[int, tuple[Any, tuple[int, ...]]]  # tensor, (dtype, numpy shape)


def as_array(tensor: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """A tensor's memory, seen with numpy's `shape`."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * size).from_address(ggml.get_data(tensor))
    return np.frombuffer(memory, dtype).reshape(shape)


def swiglu_parts(context: int, interleaved: int, n_values: int) -> list[int]:
    """Gate's and up's `n_values` values each, out of an interleaved product: [INTERLEAVED, the rest]."""
    size = INTERLEAVED * _FLOAT
    return [
        ggml.view_2d(context, interleaved, INTERLEAVED, n_values // INTERLEAVED, 2 * size, offset)
        for offset in (0, size)
    ]


class _Builder:
    """Adds the operations of one spec to one graph. Tensors are pointers; comments give ggml's ne order."""

    def __init__(self, parts: GraphParts, spec: GraphSpec, context: int, graph: int) -> None:
        self._parts = parts
        self._hp = parts.hyperparameters
        self._weights = parts.weights
        self._spec = spec
        self._ctx = context
        self._graph = graph
        self._rows = spec.rows  # falls to spec.outputs once the rows without logits are dropped
        self._scales: dict[str, int] = {}
        self.inputs: dict[str, _Shaped] = {}
        self.outputs: dict[str | Capture, _Shaped] = {}

    def build(self) -> None:
        spec, hp = self._spec, self._hp
        x = self._first_residual()  # [n_embd, rows]
        if spec.first < spec.last:
            self._positions = self._input("positions", np.int32, spec.rows)
            self._cells = self._input("cells", np.int64, spec.rows)
            self._mask = self._input("mask", np.float16, spec.rows, spec.n_kv)
        for layer in range(spec.first, spec.last):
            x = self._before(layer, x)
            x = ggml.add(self._ctx, self._attention(layer, x), x)
            if layer == hp.n_layers - 1 and self._narrows_early():
                x = self._narrow(x)
            x = self._feed_forward(layer, x)
        x = self._before(spec.last, x)
        if spec.outputs:
            if self._rows != spec.outputs:
                x = self._narrow(x)
            x = self._norm(x, "output_norm.weight")
            if not spec.head:
                self._output("head_input", x, spec.outputs, hp.n_embd)
                return
            head = HEAD if HEAD in self._weights else EMBEDDING
            logits = self._with_side(HEAD, ggml.mul_mat(self._ctx, self._weights[head], x), x)
            self._output("logits", logits, spec.outputs, hp.n_vocab)

    # --- inputs and outputs -------------------------------------------------------------------

    def _input(self, name: str, dtype: Any, *shape: int) -> int:
        """A tensor with numpy's `shape` that is written before each run."""
        kinds = {np.float32: ggml.TYPE_F32, np.float16: ggml.TYPE_F16, np.int32: ggml.TYPE_I32}
        kind = kinds.get(dtype, ggml.TYPE_I64)
        extents = (*reversed(shape), 1, 1)[:3]
        tensor: int = ggml.new_tensor_3d(self._ctx, kind, *extents)
        ggml.set_input(tensor)
        # Part of the graph, and so given memory, even where nothing that is asked for needs it.
        ggml.build_forward_expand(self._graph, tensor)
        self.inputs[name] = (tensor, (dtype, shape))
        return tensor

    def _output(self, name: str | Capture, tensor: int, *shape: int) -> None:
        ggml.set_output(tensor)
        ggml.build_forward_expand(self._graph, tensor)
        self.outputs[name] = (tensor, (np.float32, shape))

    def _capture(self, kind: CaptureKind, layer: int, tensor: int, width: int) -> None:
        capture = Capture(kind, layer)
        if capture in self._spec.captures:
            self._output(capture, tensor, self._rows, width)

    def _first_residual(self) -> int:
        spec = self._spec
        if spec.from_hidden:
            return self._input("hidden", np.float32, spec.rows, self._hp.n_embd)
        tokens = self._input("tokens", np.int32, spec.rows)
        embedded: int = ggml.get_rows(self._ctx, self._weights[EMBEDDING], tokens)
        return embedded

    def _before(self, layer: int, x: int) -> int:
        """Additions to, and capture of, the residual stream before `layer`."""
        if layer in self._spec.additions:
            x = ggml.add(
                self._ctx, x, self._input(f"add.{layer}", np.float32, self._spec.rows, self._hp.n_embd)
            )
        self._capture("residual", layer, x, self._hp.n_embd)
        return x

    def _narrows_early(self) -> bool:
        """Whether rows without logits can be dropped before the last FFN: nothing else asks for them."""
        spec, last = self._spec, self._hp.n_layers - 1
        asked = any(c.layer > last or (c.layer == last and c.kind != "residual") for c in spec.captures)
        return (
            0 < spec.outputs < spec.rows
            and not asked
            and last + 1 not in spec.additions
            and spec.groups_of(last) == DENSE
        )

    def _narrow(self, x: int) -> int:
        if "output_rows" not in self.inputs:
            self._output_rows = self._input("output_rows", np.int32, self._spec.outputs)
        self._rows = self._spec.outputs
        narrowed: int = ggml.get_rows(self._ctx, x, self._output_rows)
        return narrowed

    # --- linear maps --------------------------------------------------------------------------

    def _norm(self, x: int, name: str) -> int:
        normalised = ggml.rms_norm(self._ctx, x, self._hp.norm_epsilon)
        result: int = ggml.mul(self._ctx, normalised, self._weights[name])
        return result

    def _side_scale(self, name: str, rank: int) -> int:
        """Per-token scales of a matrix's side path, [rank, rows]."""
        if name not in self._scales:
            self._scales[name] = self._input(f"scale.{name}", np.float32, self._spec.rows, rank)
        scale = self._scales[name]
        return ggml.get_rows(self._ctx, scale, self._output_rows) if self._rows != self._spec.rows else scale

    def _side(self, name: str, x: int) -> int | None:
        """B (s * (A x)), what the adapters add to this matrix's product; None without adapters."""
        adapters = self._parts.adapters
        path = adapters.paths.get(name) if adapters and self._spec.adapter_version else None
        if path is None:
            return None
        low = ggml.mul_mat(self._ctx, path.a, x)  # [rank, rows]
        low = ggml.mul(self._ctx, low, self._side_scale(name, path.rank))
        side: int = ggml.mul_mat(self._ctx, path.b, low)
        return side

    def _with_side(self, name: str, product: int, x: int) -> int:
        side = self._side(name, x)
        return product if side is None else ggml.add(self._ctx, product, side)

    def _finish(self, layer: int, kind: str, product: int, x: int) -> int:
        """Bias and side path of one matrix's product."""
        bias = self._weights.get(f"blk.{layer}.{kind}.bias")
        if bias is not None:
            product = ggml.add(self._ctx, product, bias)
        return self._with_side(f"blk.{layer}.{kind}.weight", product, x)

    def _linear(self, layer: int, kind: str, x: int) -> int:
        product = ggml.mul_mat(self._ctx, self._weights[f"blk.{layer}.{kind}.weight"], x)
        return self._finish(layer, kind, product, x)

    # --- attention ----------------------------------------------------------------------------

    def _attention(self, layer: int, x: int) -> int:
        hp, ctx, spec = self._hp, self._ctx, self._spec
        kv_width = hp.n_head_kv * hp.head_dim
        q, k, v = self._query_key_value(layer, self._norm(x, f"blk.{layer}.attn_norm.weight"))
        q = self._rope(layer, "attn_q", q, hp.n_head)
        k = self._rope(layer, "attn_k", k, hp.n_head_kv)
        k = ggml.reshape_2d(ctx, k, kv_width, spec.rows)
        kv = self._parts.kv
        keys, values = kv.keys[layer], kv.values[layer]
        # Written before attention reads: the graph runs nodes in the order they are added.
        ggml.build_forward_expand(self._graph, ggml.set_rows(ctx, keys, k, self._cells))
        ggml.build_forward_expand(self._graph, ggml.set_rows(ctx, values, v, self._cells))
        strides = [ggml.row_size(kv.type, width) for width in (kv_width, hp.head_dim)]
        keys = ggml.view_3d(ctx, keys, hp.head_dim, spec.n_kv, hp.n_head_kv, *strides, 0)
        values = ggml.view_3d(ctx, values, hp.head_dim, spec.n_kv, hp.n_head_kv, *strides, 0)
        q = ggml.permute(ctx, q, 0, 2, 1, 3)  # [head_dim, rows, n_head]
        attended = ggml.flash_attn_ext(ctx, q, keys, values, self._mask, hp.attention_scale, 0.0, 0.0)
        ggml.prec_set_acc(attended, ggml.PREC_F32)
        attended = ggml.reshape_2d(ctx, attended, hp.n_head * hp.head_dim, spec.rows)
        return self._linear(layer, "attn_output", attended)

    def _query_key_value(self, layer: int, x: int) -> list[int]:
        """[heads * head_dim, rows] each; rows may be strided."""
        kv_width = self._hp.n_head_kv * self._hp.head_dim
        widths = {"attn_q": self._hp.n_head * self._hp.head_dim, "attn_k": kv_width, "attn_v": kv_width}
        fused = self._weights.get(f"blk.{layer}.attn_qkv.weight")
        if fused is None:
            return [self._linear(layer, kind, x) for kind in widths]
        product = ggml.mul_mat(self._ctx, fused, x)
        stride = sum(widths.values()) * _FLOAT
        results, offset = [], 0
        for kind, width in widths.items():
            part = ggml.view_2d(self._ctx, product, width, self._rows, stride, offset)
            results.append(self._finish(layer, kind, part, x))
            offset += width * _FLOAT
        return results

    def _rope(self, layer: int, kind: str, x: int, n_heads: int) -> int:
        hp, ctx = self._hp, self._ctx
        stride = ggml.row_stride(x)
        x = ggml.view_3d(ctx, x, hp.head_dim, n_heads, self._spec.rows, hp.head_dim * _FLOAT, stride, 0)
        if hp.qk_norm:
            x = self._norm(x, f"blk.{layer}.{kind}_norm.weight")
        rope = hp.rope
        mode = ggml.ROPE_TYPE_NEOX if rope.neox else ggml.ROPE_TYPE_NORMAL
        factors = self._weights.get("rope_freqs.weight")
        frequencies = (rope.freq_base, rope.freq_scale, rope.ext_factor, rope.attn_factor)
        bounds = (rope.beta_fast, rope.beta_slow)
        rotated: int = ggml.rope_ext(
            ctx, x, self._positions, factors, rope.n_dims, mode, rope.n_ctx_orig, *frequencies, *bounds
        )
        return rotated

    # --- feed-forward -------------------------------------------------------------------------

    def _feed_forward(self, layer: int, residual: int) -> int:
        hp, ctx = self._hp, self._ctx
        count = self._spec.groups_of(layer)
        x = self._norm(residual, f"blk.{layer}.ffn_norm.weight")
        self._capture("ffn_input", layer, x, hp.n_embd)
        output = None
        if count == DENSE:
            output = self._dense_ffn(layer, x)
        elif count > 0:
            output = self._grouped_ffn(layer, x, count)
        if layer in self._spec.fills:
            fill = self._input(f"fill.{layer}", np.float32, hp.n_embd)
            output = fill if output is None else ggml.add(ctx, output, fill)
        if output is None:
            return residual
        result: int = ggml.add(ctx, residual, output)
        if count != 0:
            self._capture("ffn_output", layer, output, hp.n_embd)
        return result

    def _dense_ffn(self, layer: int, x: int) -> int:
        hp, ctx = self._hp, self._ctx
        fused = self._weights.get(f"blk.{layer}.ffn_gate_up.weight")
        if fused is None:
            gate, up = (self._linear(layer, kind, x) for kind in _GATE_UP)
        else:
            gate, up = swiglu_parts(ctx, ggml.mul_mat(ctx, fused, x), hp.n_ff * self._rows)
            gate = self._add_aligned(gate, self._side(f"blk.{layer}.ffn_gate.weight", x))
            up = self._add_aligned(up, self._side(f"blk.{layer}.ffn_up.weight", x))
        activation = ggml.reshape_2d(ctx, ggml.swiglu_split(ctx, gate, up), hp.n_ff, self._rows)
        self._capture("ffn_activation", layer, activation, hp.n_ff)
        return self._linear(layer, "ffn_down", activation)

    def _add_aligned(self, part: int, side: int | None) -> int:
        """`part` plus a contiguous side path of as many values, in the shape that `part` has."""
        if side is None:
            return part
        width, n_rows = ggml.extents(part)
        result: int = ggml.add(self._ctx, ggml.reshape_2d(self._ctx, side, width, n_rows), part)
        return result

    def _grouped_ffn(self, layer: int, x: int, count: int) -> int:
        """The FFN over `count` neuron groups: groups are experts, chosen by ids."""
        hp, ctx, rows = self._hp, self._ctx, self._rows
        grouped = self._parts.grouped[layer]
        size = grouped.group_size
        ids = self._input(f"groups.{layer}", np.int32, rows, count)
        expanded = ggml.reshape_3d(ctx, x, hp.n_embd, 1, rows)
        if grouped.gate_up is not None:
            both = ggml.mul_mat_id(ctx, grouped.gate_up, expanded, ids)  # [2 size, count, rows]
            gate, up = swiglu_parts(ctx, both, count * size * rows)
        else:
            gate, up = (
                ggml.reshape_2d(ctx, ggml.mul_mat_id(ctx, matrix, expanded, ids), count * size, rows)
                for matrix in (grouped.gate, grouped.up)
            )
        gate = self._add_aligned(gate, self._group_side(layer, "ffn_gate", x, ids))
        up = self._add_aligned(up, self._group_side(layer, "ffn_up", x, ids))
        activation = ggml.reshape_3d(ctx, ggml.swiglu_split(ctx, gate, up), size, count, rows)
        self._capture("ffn_activation", layer, activation, count * size)
        parts = ggml.mul_mat_id(ctx, grouped.down, activation, ids)  # [n_embd, count, rows]
        output = self._sum_groups(parts, hp.n_embd)
        return self._add_down_side(layer, output, activation, ids)

    def _sum_groups(self, parts: int, width: int) -> int:
        """Sum over the groups: [width, count, rows] -> [width, rows]."""
        shape = ggml.new_tensor_3d(self._ctx, ggml.TYPE_F32, width, 1, self._rows)
        summed = ggml.repeat_back(self._ctx, parts, shape)
        result: int = ggml.reshape_2d(self._ctx, summed, width, self._rows)
        return result

    def _group_side(self, layer: int, kind: str, x: int, ids: int) -> int | None:
        """Side path of gate or up, cut to the chosen groups: [group_size, count, rows]."""
        side = self._side(f"blk.{layer}.{kind}.weight", x)
        if side is None:
            return None
        grouped, ctx = self._parts.grouped[layer], self._ctx
        if grouped.padding:
            side = ggml.pad(ctx, side, grouped.padding, 0, 0, 0)
        side = ggml.reshape_3d(ctx, side, grouped.group_size, grouped.n_groups, self._rows)
        chosen: int = ggml.get_rows(ctx, side, ids)
        return chosen

    def _add_down_side(self, layer: int, output: int, activation: int, ids: int) -> int:
        """Side path of down over the chosen groups' columns of A."""
        adapters = self._parts.adapters
        name = f"blk.{layer}.ffn_down.weight"
        path = adapters.paths.get(name) if adapters and self._spec.adapter_version else None
        if path is None or path.a_grouped is None:
            return output
        ctx = self._ctx
        low = ggml.mul_mat_id(ctx, path.a_grouped, activation, ids)  # [rank, count, rows]
        low = ggml.mul(ctx, self._sum_groups(low, path.rank), self._side_scale(name, path.rank))
        result: int = ggml.add(ctx, output, ggml.mul_mat(ctx, path.b, low))
        return result
