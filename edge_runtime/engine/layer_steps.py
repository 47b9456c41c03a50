"""A model's forward pass taken apart at its FFNs, so that others can compute those.

Between `begin` and `logits` the caller goes through the layers: `attention` gives the residual stream and
what the layer's FFN takes; the caller adds the FFN's output, from wherever it comes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import ggml
from edge_runtime.engine.batch import Batch, CheckedBatch
from edge_runtime.engine.graph import Capture, Graph, GraphSpec
from edge_runtime.engine.model import Model
from edge_runtime.errors import OutOfMemoryError, RequestError

Floats = NDArray[np.float32]

_MAX_SHAPES = 4  # batch shapes whose graphs are kept, one graph a layer


class AttentionResult(NamedTuple):
    """Both (n_rows, n_embd); overwritten by the next call.

    Attributes:
        residual: the residual stream after attention.
        ffn_input: normalised, what the layer's FFN takes.
    """

    residual: Floats
    ffn_input: Floats


class _Shape(NamedTuple):
    rows: int
    n_kv: int
    adapter_version: int


@dataclass(slots=True)
class _Step:
    """The batch in progress."""

    rows: CheckedBatch
    cells: NDArray[np.int64]
    graphs: list[Graph]
    mask: NDArray[np.float16]
    scales: dict[str, NDArray[np.float32]]


class LayerSteps:
    """Runs one model layer by layer. It shares the model's weights, KV cache and thread pool.

    Raises:
        OutOfMemoryError: ggml could not start.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._hp = model.hyperparameters
        self._allocator: int = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        if not self._allocator:
            raise OutOfMemoryError("no memory to start the CPU backend")
        self._shapes: OrderedDict[_Shape, list[Graph]] = OrderedDict()
        self._others: OrderedDict[GraphSpec, Graph] = OrderedDict()
        self._buffer_bytes = 0
        self._step: _Step | None = None

    def begin(self, batch: Batch) -> Floats:
        """Start a batch; its keys and values get their cells in the KV cache.

        Returns:
            the embedded tokens (n_rows, n_embd), the residual stream before layer 0.

        Raises:
            RequestError: as `Model.forward`, and for anything but tokens, logits and adapters.
            ContextOverflowError: the KV cache has too few free cells; nothing was changed.
        """
        if batch.tokens is None or batch.layers or batch.groups or batch.fill or batch.add or batch.capture:
            raise RequestError("layer by layer, a batch has tokens, logits and adapters, and nothing else")
        model = self._model
        rows = CheckedBatch(batch, self._hp, None, model.adapters)
        n_rows = len(rows.positions)
        cells = model.cells.place(rows.sequences, rows.positions)
        padded, n_kv = model.padded_rows(n_rows), model.attended_cells()
        version = model.adapters.version if model.adapters is not None and batch.adapters else 0
        if version:
            self._drop_older(version)
        shape = _Shape(padded, n_kv, version)
        embedding = self._other(GraphSpec(rows=padded, n_kv=0, outputs=0, first=0, last=0, captures=_BEFORE))
        embedding.inputs["tokens"][:n_rows] = rows.tokens
        embedding.inputs["tokens"][n_rows:] = 0
        model.backend.compute(embedding.pointer)
        hidden: Floats = embedding.outputs[Capture("residual", 0)][:n_rows].copy()
        graphs = self._graphs(shape)
        mask = np.full((padded, n_kv), -np.inf, np.float16)
        model.cells.write_mask(mask, rows.sequences, rows.positions)
        mask[n_rows:, 0] = 0  # a row that sees nothing would be a division by zero
        names = {name: None for graph in graphs for name in graph.inputs} if version else {}
        scales = {name: values for name, values in rows.values(model.adapters, names) if name in names}
        self._step = _Step(rows, cells, graphs, mask, scales)
        return hidden

    @property
    def strengths(self) -> dict[str, Floats]:
        """Of the adapters that the batch names, (n_rows,) each."""
        return self._current().rows.strengths

    @property
    def wanted(self) -> NDArray[np.int32]:
        """The rows whose logits the batch wants."""
        return self._current().rows.wanted

    def attention(self, layer: int, hidden: Floats) -> AttentionResult:
        """Attention of one layer, over the residual stream (n_rows, n_embd) before it."""
        step = self._current()
        graph, n_rows = step.graphs[layer], len(hidden)
        inputs = graph.inputs
        inputs["hidden"][:n_rows] = hidden
        inputs["positions"][:n_rows] = step.rows.positions
        inputs["cells"][:n_rows] = step.cells
        inputs["mask"][:] = step.mask
        if len(inputs["positions"]) > n_rows:
            inputs["hidden"][n_rows:] = hidden[:1]
            inputs["positions"][n_rows:] = 0
            inputs["cells"][n_rows:] = self._model.spare_cell
        for name in inputs.keys() & step.scales.keys():
            values = step.scales[name]
            inputs[name][: len(values)] = values
            inputs[name][len(values) :] = values[:1]
        self._model.backend.compute(graph.pointer)
        outputs = graph.outputs
        return AttentionResult(
            outputs[Capture("residual", layer + 1)][:n_rows], outputs[Capture("ffn_input", layer)][:n_rows]
        )

    def logits(self, hidden: Floats) -> Floats:
        """Logits (n_wanted, n_vocab) of the rows that the batch wants, from the last residual stream."""
        return self._last("logits", hidden, self._hp.n_vocab)

    def head_input(self, hidden: Floats) -> Floats:
        """What the head takes, (n_wanted, n_embd): for a head that is computed elsewhere."""
        return self._last("head_input", hidden, self._hp.n_embd)

    def _last(self, name: str, hidden: Floats, width: int) -> Floats:
        wanted = self._current().rows.wanted
        if not len(wanted):
            return np.empty((0, width), np.float32)
        n_layers, padded = self._hp.n_layers, self._model.padded_rows(len(wanted))
        spec = GraphSpec(
            rows=padded,
            n_kv=0,
            outputs=padded,
            first=n_layers,
            last=n_layers,
            from_hidden=True,
            head=name == "logits",
        )
        graph = self._other(spec)
        graph.inputs["hidden"][: len(wanted)] = hidden[wanted]
        graph.inputs["hidden"][len(wanted) :] = hidden[wanted[:1]]
        self._model.backend.compute(graph.pointer)
        result: Floats = graph.outputs[name][: len(wanted)].copy()
        return result

    def _current(self) -> _Step:
        if self._step is None:
            raise RequestError("no batch has begun")
        return self._step

    # --- graphs -------------------------------------------------------------------------------

    def _graphs(self, shape: _Shape) -> list[Graph]:
        found = self._shapes.get(shape)
        if found is not None:
            self._shapes.move_to_end(shape)
            return found
        while len(self._shapes) >= _MAX_SHAPES:
            for graph in self._shapes.popitem(last=False)[1]:
                graph.free()
        # A graph that makes the shared buffer grow moves it under all others: then they are built again.
        while True:
            graphs = [self._build(self._spec(shape, layer)) for layer in range(self._hp.n_layers)]
            if not self._grew():
                break
            self._drop(graphs)
        self._shapes[shape] = graphs
        return graphs

    def _drop_older(self, version: int) -> None:
        """Free graphs of adapters that the model has no more."""
        for shape in [shape for shape in self._shapes if 0 < shape.adapter_version != version]:
            for graph in self._shapes.pop(shape):
                graph.free()

    @staticmethod
    def _spec(shape: _Shape, layer: int) -> GraphSpec:
        return GraphSpec(
            rows=shape.rows,
            n_kv=shape.n_kv,
            outputs=0,
            first=layer,
            last=layer + 1,
            from_hidden=True,
            groups=(0,),
            captures=frozenset({Capture("ffn_input", layer), Capture("residual", layer + 1)}),
            adapter_version=shape.adapter_version,
        )

    def _other(self, spec: GraphSpec) -> Graph:
        graph = self._others.get(spec)
        if graph is None:
            while len(self._others) >= 2 * _MAX_SHAPES:
                self._others.popitem(last=False)[1].free()
            graph = self._build(spec)
            if self._grew():
                self._drop([graph])
                graph = self._build(spec)
            self._others[spec] = graph
        return graph

    def _build(self, spec: GraphSpec) -> Graph:
        return Graph(self._model.parts, spec, self._allocator)

    def _grew(self) -> bool:
        size = int(ggml.gallocr_get_buffer_size(self._allocator, 0))
        grew, self._buffer_bytes = size > self._buffer_bytes, size
        return grew

    def _drop(self, graphs: list[Graph]) -> None:
        for graph in chain(graphs, self._others.values(), *self._shapes.values()):
            graph.free()
        self._others.clear()
        self._shapes.clear()

    def close(self) -> None:
        """Free the graphs; safe to call twice."""
        self._drop([])
        self._step = None
        if self._allocator:
            ggml.gallocr_free(self._allocator)
            self._allocator = 0


_BEFORE = frozenset({Capture("residual", 0)})
