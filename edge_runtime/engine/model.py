"""A loaded model: runs batches of tokens through its graphs and keeps its KV cache.

One model is used by one thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np

from edge_runtime.engine.adapters import AdapterBank, LowRank
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.backend import Backend
from edge_runtime.engine.batch import Batch, CheckedBatch, Result
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.graph import DENSE, Capture, Graph, GraphParts, GraphSpec
from edge_runtime.engine.kv_cache import KVCells
from edge_runtime.engine.kv_tensors import KVTensors, KVType
from edge_runtime.engine.neuron_groups import NeuronGroups
from edge_runtime.engine.weights import Weights

# Attention looks at a multiple of this many cells, so that graphs are reused. Masked cells are not free:
# with 256, llama.cpp's step, a token after 32 others took 3 % longer, four of them together 6 %.
_KV_STEP = 64
_MAX_GRAPHS = 24
_PACK = 4  # rows that the repack kernels multiply at once
_MIN_PACKED = 2  # this many rows cost as much as four, measured


class Model:
    """Weights, KV cache and graphs of one GGUF file.

    Args:
        gguf: the open, checked file; must stay open as long as the model lives.
        n_cells: tokens that the KV cache holds, all sequences together.
        n_sequences: sequences that can be kept apart.
        threads: CPU threads.
        kv_type: how keys and values are kept: ``f16``, ``f32`` (twice the memory) or ``q8_0`` (half).
        repack: copy weights to the layout of the fastest kernels; False leaves them in the file.
        ffn, head: False leaves the FFNs' weights, or the LM head's, in the file even so: others compute them.
        progress: called with the share loaded, 0 .. 1.
        weights: of another model of the same file, which must outlive this one; then nothing is loaded, and
            the four arguments before this one mean nothing.

    Attributes:
        kv_bytes: memory that a full KV cache takes.
        backend, parts, adapters: what its graphs are computed with and made of.

    Raises:
        OutOfMemoryError: weights or KV cache do not fit.
        RequestError: ``q8_0`` keys for heads whose width is no multiple of 32.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        hyperparameters: Hyperparameters,
        *,
        n_cells: int,
        n_sequences: int = 1,
        threads: int = 1,
        kv_type: KVType = "f16",
        repack: bool = True,
        ffn: bool = True,
        head: bool = True,
        progress: Callable[[float], None] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.hyperparameters = hyperparameters
        self.cells = KVCells(n_cells, n_sequences)
        self.groups: NeuronGroups | None = None
        self.adapters: AdapterBank | None = None
        self._adapter_version = 0
        self._graphs: OrderedDict[GraphSpec, Graph] = OrderedDict()
        self._graph_bytes = 0
        self._n_kv_max = -(-n_cells // _KV_STEP) * _KV_STEP
        with ExitStack() as resources:
            # One row more than attention sees takes the keys of padding tokens.
            kv = resources.enter_context(closing(KVTensors(hyperparameters, self._n_kv_max + 1, kv_type)))
            self.backend = resources.enter_context(closing(Backend(threads)))
            if weights is None:
                weights = Weights(
                    gguf,
                    hyperparameters,
                    repack=repack,
                    ffn=ffn,
                    head=head,
                    threads=threads,
                    progress=progress,
                )
                resources.enter_context(closing(weights))
            self.weights = weights
            self._resources = resources.pop_all()
        self.kv_bytes = kv.nbytes
        self._packs = self.weights.repacked_bytes > self.weights.mapped_bytes
        self.parts = GraphParts(hyperparameters, self.weights, kv)

    @property
    def threads(self) -> int:
        """CPU threads that graphs are computed with."""
        return self.backend.threads

    # --- what can be added to a loaded model --------------------------------------------------

    def cut_neuron_groups(self, group_size: int | None = None) -> NeuronGroups:
        """Prepare the FFNs for computing chosen neuron groups; costs a second copy of ffn_down.

        Raises:
            RequestError: a group size that the file's quantization does not allow.
        """
        if self.groups is None or (group_size is not None and self.groups.group_size != group_size):
            groups = NeuronGroups(self.weights, self.hyperparameters, group_size)
            self._drop_graphs()
            if self.groups is not None:
                self.groups.close()
            self.groups = groups
            self.parts.grouped = groups.layers
            if self.adapters is not None:  # their side paths are cut like the FFN
                self.set_adapters(self.adapters.adapters)
        return self.groups

    def set_adapters(self, adapters: Mapping[str, Sequence[LowRank]]) -> None:
        """Replace the side paths that batches can switch on by name.

        Raises:
            RequestError: an adapter that does not fit the model; the old ones stay.
        """
        self._adapter_version += 1
        bank = AdapterBank(adapters, self.weights, self.hyperparameters, self.groups, self._adapter_version)
        self._drop_graphs()
        if self.adapters is not None:
            self.adapters.close()
        self.adapters = self.parts.adapters = bank

    # --- running ------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Result:
        """Run a batch; its keys and values stay in the KV cache.

        Raises:
            RequestError: a value out of range or of the wrong shape.
            ContextOverflowError: the KV cache has too few free cells; nothing was changed.
        """
        rows = CheckedBatch(batch, self.hyperparameters, self.groups, self.adapters)
        n_rows = len(rows.positions)
        cells = self.cells.place(rows.sequences, rows.positions)
        graph = self._graph(self._spec(batch, rows))
        inputs = graph.inputs
        if "cells" in inputs:
            inputs["positions"][:n_rows] = rows.positions
            inputs["positions"][n_rows:] = 0
            inputs["cells"][:n_rows] = cells
            inputs["cells"][n_rows:] = self._n_kv_max
            self.cells.write_mask(inputs["mask"], rows.sequences, rows.positions)
            inputs["mask"][n_rows:] = -np.inf
            inputs["mask"][n_rows:, 0] = 0  # a row that sees nothing would be a division by zero
        for name, values in rows.values(self.adapters, inputs):
            target = inputs[name]
            target[: len(values)] = values
            # Padding rows repeat the first: group ids must differ within a row, zeros would not.
            target[len(values) :] = values[:1]
        self.backend.compute(graph.pointer)
        captured = {
            capture: values[:n_rows].copy()
            for capture, values in graph.outputs.items()
            if isinstance(capture, Capture)
        }
        logits = graph.outputs.get("logits")
        if logits is None:
            return Result(np.empty((0, self.hyperparameters.n_vocab), np.float32), captured)
        if graph.spec.outputs == graph.spec.rows:  # every row has logits, in the batch's order
            return Result(logits[rows.wanted], captured)
        return Result(logits[: len(rows.wanted)].copy(), captured)

    def _spec(self, batch: Batch, rows: CheckedBatch) -> GraphSpec:
        n_rows, n_wanted = len(rows.positions), len(rows.wanted)
        padded = self.padded_rows(n_rows)
        outputs = padded if n_wanted == n_rows else min(self.padded_rows(n_wanted), padded)
        n_kv = self.attended_cells()
        return GraphSpec(
            rows=padded,
            n_kv=n_kv,
            outputs=outputs if n_wanted else 0,
            first=rows.layers.start,
            last=rows.layers.stop,
            from_hidden=batch.hidden is not None,
            groups=tuple(
                rows.groups[layer].shape[1] if layer in rows.groups else DENSE for layer in rows.layers
            )
            if rows.groups
            else (),
            fills=frozenset(batch.fill),
            additions=frozenset(batch.add),
            captures=frozenset(batch.capture),
            adapter_version=self.adapters.version if self.adapters is not None and batch.adapters else 0,
        )

    def attended_cells(self) -> int:
        """Cells that attention looks at now: all in use, and some, so that graphs are reused."""
        return max(_KV_STEP, -(-self.cells.end // _KV_STEP) * _KV_STEP)

    @property
    def spare_cell(self) -> int:
        """The row of the KV cache that takes the keys of padding tokens."""
        return self._n_kv_max

    def padded_rows(self, n_rows: int) -> int:
        """Rows to compute for `n_rows`: two or three cost as much as the four that a kernel takes."""
        return n_rows + _PACK - n_rows % _PACK if self._packs and n_rows % _PACK >= _MIN_PACKED else n_rows

    def _graph(self, spec: GraphSpec) -> Graph:
        graph = self._graphs.get(spec)
        if graph is not None:
            self._graphs.move_to_end(spec)
            return graph
        while len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)[1].free()
        graph = Graph(self.parts, spec, self.backend.allocator)
        if self.backend.graph_bytes > self._graph_bytes:
            # The shared buffer grew and moved: graphs built before point into the old one.
            self._graph_bytes = self.backend.graph_bytes
            self._drop_graphs()
        self._graphs[spec] = graph
        return graph

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()

    def close(self) -> None:
        """Free everything; safe to call twice."""
        self._drop_graphs()
        for part in (self.adapters, self.groups):
            if part is not None:
                part.close()
        self._resources.close()
