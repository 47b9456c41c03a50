"""ggml's CPU backend with a thread pool that lives as long as it does."""

from __future__ import annotations

import ctypes
import os

import psutil

from edge_runtime.engine import ggml
from edge_runtime.errors import EdgeRuntimeError, OutOfMemoryError, RequestError


def default_threads() -> int:
    """Physical cores this process may run on: hyperthreads share the units that multiply."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


class Backend:
    """Computes graphs on the CPU.

    Args:
        threads: CPU threads, 1 .. 512.

    Raises:
        RequestError: a thread count out of range.
        OutOfMemoryError: ggml could not start.
    """

    def __init__(self, threads: int) -> None:
        if not 1 <= threads <= ggml.MAX_THREADS:
            raise RequestError(f"{threads} threads were asked for; possible are 1 to {ggml.MAX_THREADS}")
        self.threads = threads
        self._backend: int = ggml.backend_cpu_init()
        self.allocator: int = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        parameters = ggml.ThreadpoolParams()
        ggml.threadpool_params_init(ctypes.byref(parameters), threads)
        self._threadpool: int = ggml.threadpool_new(ctypes.byref(parameters))
        if not (self._backend and self.allocator and self._threadpool):
            raise OutOfMemoryError("no memory to start the CPU backend")
        ggml.backend_cpu_set_n_threads(self._backend, threads)
        ggml.backend_cpu_set_threadpool(self._backend, self._threadpool)

    @property
    def graph_bytes(self) -> int:
        """Size of the buffer that all graphs' intermediate values share."""
        return int(ggml.gallocr_get_buffer_size(self.allocator, 0))

    def compute(self, graph: int) -> None:
        """Run a graph to its end.

        Raises:
            EdgeRuntimeError: ggml reports a failure.
        """
        status = ggml.backend_graph_compute(self._backend, graph)
        if status != ggml.STATUS_SUCCESS:
            raise EdgeRuntimeError(f"ggml could not compute a graph (status {status})")

    def close(self) -> None:
        """Free the backend; safe to call twice."""
        if self._backend:
            ggml.backend_free(self._backend)
            ggml.threadpool_free(self._threadpool)
            ggml.gallocr_free(self.allocator)
            self._backend = self._threadpool = self.allocator = 0
