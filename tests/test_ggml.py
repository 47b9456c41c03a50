"""The binding of the ggml libraries."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from edge_runtime.engine import ggml
from edge_runtime.engine.backend import Backend, default_threads
from edge_runtime.engine.gguf import GGML_TYPES
from edge_runtime.engine.weights import RepackedTypes, TensorContext
from edge_runtime.errors import DependencyError, RequestError


def test_every_declared_function_has_its_types() -> None:
    names = [name for table in ggml._SIGNATURES.values() for name in table]
    assert len(names) == len(set(names)) > 60
    for name in names:
        assert getattr(ggml, name).argtypes is not None


def test_an_undeclared_function_is_no_silent_int() -> None:
    with pytest.raises(AttributeError, match="not declared"):
        ggml.abort()


def test_the_tensor_layout_is_the_librarys() -> None:
    context = TensorContext(2)
    tensor = ggml.new_tensor_3d(context.pointer, ggml.TYPE_F16, 6, 5, 4)
    head = ggml.TensorHead.from_address(tensor)
    assert head.type == ggml.TYPE_F16
    assert list(head.ne) == [6, 5, 4, 1] and list(head.nb) == [2, 12, 60, 240]
    assert ggml.row_stride(tensor) == 12
    context.free()
    context.free()


def test_the_readers_table_of_types_is_ggmls() -> None:
    for number, kind in GGML_TYPES.items():
        assert ggml.type_name(number).decode().upper() == kind.name.upper()
        assert (ggml.blck_size(number), ggml.type_size(number)) == (kind.block_size, kind.block_bytes)


def test_only_matrices_with_kernels_are_repacked() -> None:
    types = RepackedTypes()
    assert not types.takes(ggml.TYPE_F32, 64)
    assert not types.takes(2, 1)
    if types.buffer_type is None:
        pytest.skip("this build of ggml repacks nothing on this CPU")
    assert types.takes(2, 64), "Q4_0 is repacked on every CPU that has a repack buffer"
    assert not types.takes(2, 63)


def test_a_graph_computes_what_numpy_computes() -> None:
    backend, context = Backend(2), TensorContext(8)
    graph_context = ggml.init(ggml.InitParams(ggml.graph_overhead_custom(8, False), None, True))
    a, b = (ggml.new_tensor_2d(context.pointer, ggml.TYPE_F32, 3, rows) for rows in (4, 2))
    ggml.set_input(a)
    ggml.set_input(b)
    product = ggml.mul_mat(context.pointer, a, b)
    ggml.set_output(product)
    graph = ggml.new_graph_custom(graph_context, 8, False)
    ggml.build_forward_expand(graph, product)
    assert ggml.gallocr_alloc_graph(backend.allocator, graph)

    def array(tensor: int, *shape: int) -> np.ndarray:
        size = 4 * int(np.prod(shape))
        return np.frombuffer((ctypes.c_char * size).from_address(ggml.get_data(tensor)), np.float32).reshape(
            shape
        )

    left, right = array(a, 4, 3), array(b, 2, 3)
    left[:], right[:] = np.arange(12).reshape(4, 3), np.arange(6).reshape(2, 3)
    backend.compute(graph)
    assert np.array_equal(array(product, 2, 4), right @ left.T)
    ggml.free(graph_context)
    context.free()
    backend.close()
    backend.close()


@pytest.mark.parametrize("threads", [0, -1, 513])
def test_impossible_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(RequestError, match="1 to 512"):
        Backend(threads)


def test_the_default_uses_no_more_threads_than_the_process_may() -> None:
    command = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    command += "from edge_runtime.engine.backend import default_threads; print(default_threads())"
    if not sys.platform.startswith("linux"):
        pytest.skip("CPU affinity is set here as Linux does")
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(found.stdout) == 1 <= default_threads()


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match=r"libabsent.*pip install"):
        ggml.load_library("absent")
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install llama-cpp-python==0\.3\.36"):
        ggml.library_folder()
