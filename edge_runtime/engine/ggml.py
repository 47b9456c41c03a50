"""ctypes binding of the ggml libraries that the pinned llama-cpp-python installs.

One table declares every function's argument and result types: ctypes truncates the pointers of a
function it knows nothing about. Names lose their ``ggml_`` prefix: ``ggml.mul_mat(ctx, a, b)``.
Opaque pointers are plain integers, NULL is ``None``.

ggml aborts the process when a precondition is broken, so whatever comes from a file or a peer is
checked before it gets here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from edge_runtime.errors import DependencyError

LLAMA_CPP_PYTHON = "0.3.36"

# Values of enum ggml_type that the engine itself names.
TYPE_F32 = 0
TYPE_F16 = 1
TYPE_Q8_0 = 8
TYPE_Q8_1 = 9
TYPE_Q8_K = 15
TYPE_I32 = 26
TYPE_I64 = 27

STATUS_SUCCESS = 0
PREC_F32 = 10
ROPE_TYPE_NORMAL = 0
ROPE_TYPE_NEOX = 2
TENSOR_ALIGNMENT = 32
MAX_THREADS = 512
MAX_NAME = 64


class InitParams(ctypes.Structure):
    """``struct ggml_init_params``: memory for tensor descriptions, not for their values."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class ThreadpoolParams(ctypes.Structure):
    """``struct ggml_threadpool_params``."""

    _fields_ = [
        ("cpumask", c_bool * MAX_THREADS),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


class TensorHead(ctypes.Structure):
    """The first fields of ``struct ggml_tensor``; ``nb`` are the strides in bytes."""

    _fields_ = [("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4)]


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``; conversions are addresses, None where there is none."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    ]


class CPUTypeTraits(ctypes.Structure):
    """``struct ggml_type_traits_cpu``: how the CPU's kernels take a type."""

    _fields_ = [
        ("from_float", c_void_p),
        ("vec_dot", c_void_p),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
    ]


CONVERT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)  # source, target, number of values
LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

_P = c_void_p
_I64 = c_int64
_SZ = c_size_t

Signatures = Mapping[str, tuple[Any, tuple[Any, ...]]]  # function -> (result type, argument types)

# library -> its functions, without "ggml_"
_SIGNATURES: Mapping[str, Signatures] = {
    "ggml-base": {
        "version": (c_char_p, ()),
        "commit": (c_char_p, ()),
        "log_set": (None, (LOG_CALLBACK, _P)),
        "init": (_P, (InitParams,)),
        "free": (None, (_P,)),
        "tensor_overhead": (_SZ, ()),
        "graph_overhead_custom": (_SZ, (_SZ, c_bool)),
        "new_graph_custom": (_P, (_P, _SZ, c_bool)),
        "build_forward_expand": (None, (_P, _P)),
        "graph_n_nodes": (c_int, (_P,)),
        "new_tensor_1d": (_P, (_P, c_int, _I64)),
        "new_tensor_2d": (_P, (_P, c_int, _I64, _I64)),
        "new_tensor_3d": (_P, (_P, c_int, _I64, _I64, _I64)),
        "set_name": (_P, (_P, c_char_p)),
        "set_input": (None, (_P,)),
        "set_output": (None, (_P,)),
        "get_data": (_P, (_P,)),
        "nbytes": (_SZ, (_P,)),
        "type_name": (c_char_p, (c_int,)),
        "type_size": (_SZ, (c_int,)),
        "blck_size": (_I64, (c_int,)),
        "row_size": (_SZ, (c_int, _I64)),
        "view_1d": (_P, (_P, _P, _I64, _SZ)),
        "view_2d": (_P, (_P, _P, _I64, _I64, _SZ, _SZ)),
        "view_3d": (_P, (_P, _P, _I64, _I64, _I64, _SZ, _SZ, _SZ)),
        "reshape_2d": (_P, (_P, _P, _I64, _I64)),
        "reshape_3d": (_P, (_P, _P, _I64, _I64, _I64)),
        "permute": (_P, (_P, _P, c_int, c_int, c_int, c_int)),
        "pad": (_P, (_P, _P, c_int, c_int, c_int, c_int)),
        "add": (_P, (_P, _P, _P)),
        "mul": (_P, (_P, _P, _P)),
        "rms_norm": (_P, (_P, _P, c_float)),
        "mul_mat": (_P, (_P, _P, _P)),
        "mul_mat_id": (_P, (_P, _P, _P, _P)),
        "repeat_back": (_P, (_P, _P, _P)),
        "get_rows": (_P, (_P, _P, _P)),
        "set_rows": (_P, (_P, _P, _P, _P)),
        "swiglu_split": (_P, (_P, _P, _P)),
        "rope_ext": (_P, (_P, _P, _P, _P, c_int, c_int, c_int, *(c_float,) * 6)),
        "flash_attn_ext": (_P, (_P, _P, _P, _P, _P, c_float, c_float, c_float)),
        "prec_set_acc": (c_bool, (_P, c_int)),
        "quantize_chunk": (_SZ, (c_int, _P, _P, _I64, _I64, _I64, _P)),
        "quantize_requires_imatrix": (c_bool, (c_int,)),
        "get_type_traits": (POINTER(TypeTraits), (c_int,)),
        "threadpool_params_init": (None, (POINTER(ThreadpoolParams), c_int)),
        "gallocr_new": (_P, (_P,)),
        "gallocr_free": (None, (_P,)),
        "gallocr_reserve": (c_bool, (_P, _P)),
        "gallocr_alloc_graph": (c_bool, (_P, _P)),
        "gallocr_get_buffer_size": (_SZ, (_P, c_int)),
        "backend_free": (None, (_P,)),
        "backend_graph_compute": (c_int, (_P, _P)),
        "backend_buft_name": (c_char_p, (_P,)),
        "backend_buft_alloc_buffer": (_P, (_P, _SZ)),
        "backend_buft_get_alignment": (_SZ, (_P,)),
        "backend_buft_get_alloc_size": (_SZ, (_P, _P)),
        "backend_buffer_free": (None, (_P,)),
        "backend_buffer_get_base": (_P, (_P,)),
        "backend_buffer_get_size": (_SZ, (_P,)),
        "backend_buffer_clear": (None, (_P, ctypes.c_uint8)),
        "backend_tensor_alloc": (c_int, (_P, _P, _P)),
        "backend_view_init": (c_int, (_P,)),
        "backend_tensor_set": (None, (_P, _P, _SZ, _SZ)),
        "backend_dev_supports_op": (c_bool, (_P, _P)),
        "backend_reg_dev_get": (_P, (_P, _SZ)),
        "backend_reg_get_proc_address": (_P, (_P, c_char_p)),
        "backend_cpu_buffer_from_ptr": (_P, (_P, _SZ)),
        "backend_cpu_buffer_type": (_P, ()),
    },
    "ggml-cpu": {
        "backend_cpu_init": (_P, ()),
        "backend_cpu_reg": (_P, ()),
        "backend_cpu_set_n_threads": (None, (_P, c_int)),
        "backend_cpu_set_threadpool": (None, (_P, _P)),
        "threadpool_new": (_P, (POINTER(ThreadpoolParams),)),
        "threadpool_free": (None, (_P,)),
        "get_type_traits_cpu": (POINTER(CPUTypeTraits), (c_int,)),
    },
}

CPU_FEATURES = (
    "sse3",
    "ssse3",
    "avx",
    "avx_vnni",
    "avx2",
    "bmi2",
    "f16c",
    "fma",
    "avx512",
    "avx512_vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "neon",
    "arm_fma",
    "fp16_va",
    "dotprod",
    "matmul_int8",
    "sve",
    "sme",
    "llamafile",
)

if sys.maxsize < 2**32 or sys.byteorder != "little":
    raise DependencyError(
        f"this is a {platform.machine()} system with {platform.architecture()[0]} Python, "
        f"{sys.byteorder}-endian; the engine needs a 64-bit little-endian one: install such a system"
    )


def library_folder() -> Path:
    """Folder of the shared libraries inside llama-cpp-python, found without importing it.

    Importing ``llama_cpp`` takes several times as long as loading its libraries.

    Raises:
        DependencyError: llama-cpp-python is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            f"llama-cpp-python is not installed; the engine needs its libraries: "
            f"pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        )
    return Path(spec.submodule_search_locations[0]) / "lib"


def load_library(name: str) -> ctypes.CDLL:
    """Load ``lib{name}`` (for example ``ggml-base`` or ``llama``) from llama-cpp-python.

    Raises:
        DependencyError: the library is missing or cannot be loaded.
    """
    # A backtrace after an abort starts gdb, which takes minutes on a small device.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = library_folder() / f"lib{name}{suffix}"
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DependencyError(
            f"cannot load {path}: {error}; reinstall it: "
            f"pip install --force-reinstall llama-cpp-python=={LLAMA_CPP_PYTHON}"
        ) from error


def bind(library_name: str, prefix: str, signatures: Signatures) -> dict[str, Callable[..., Any]]:
    """Functions of a library, by their names without `prefix`, with their types declared.

    Raises:
        DependencyError: the library is missing, or is another version and lacks one of them.
    """
    library = load_library(library_name)
    functions: dict[str, Callable[..., Any]] = {}
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(library, prefix + name)
        except AttributeError as error:
            raise DependencyError(
                f"lib{library_name} has no {prefix}{name}; the engine needs the libraries of "
                f"llama-cpp-python {LLAMA_CPP_PYTHON}: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
            ) from error
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


_functions = {
    name: function
    for library_name, table in _SIGNATURES.items()
    for name, function in bind(library_name, "ggml_", table).items()
}
globals().update(_functions)


def __getattr__(name: str) -> Callable[..., Any]:
    # Only type checkers and misspellings come here: every declared function is a module attribute.
    raise AttributeError(f"ggml function {name!r} is not declared in {__name__}")


def _ignore_log(level: int, text: bytes, user_data: int) -> None:
    """ggml writes its notices to stderr, which belongs to the program."""


_silent = LOG_CALLBACK(_ignore_log)  # kept for as long as ggml may call it
_functions["log_set"](_silent, None)


def row_stride(tensor: int) -> int:
    """Bytes from one row (ne[1]) of a tensor to the next."""
    return int(TensorHead.from_address(tensor).nb[1])


def extents(matrix: int) -> tuple[int, int]:
    """ne[0] and ne[1] of a tensor."""
    head = TensorHead.from_address(matrix)
    return int(head.ne[0]), int(head.ne[1])


def cpu_features() -> dict[str, bool]:
    """What the CPU kernels were compiled for: feature name -> present."""
    library = load_library("ggml-cpu")
    found = {}
    for feature in CPU_FEATURES:
        function = getattr(library, f"ggml_cpu_has_{feature}", None)
        if function is not None:
            function.restype, function.argtypes = c_int, ()
            found[feature] = bool(function())
    return found


def repack_buffer_type() -> int | None:
    """The CPU backend's buffer type that interleaves rows for its fastest kernels, or None.

    A build without repacking, or a CPU without suitable kernels, has none.
    """
    registry = _functions["backend_cpu_reg"]()
    address = _functions["backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    device = _functions["backend_reg_dev_get"](registry, 0)
    extra_types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    index = 0
    while extra_types and extra_types[index]:
        if _functions["backend_buft_name"](extra_types[index]) == b"CPU_REPACK":
            return int(extra_types[index])
        index += 1
    return None
