"""Python, the ggml libraries, the kernels in them, and whether they work."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from edge_runtime import __version__
from edge_runtime.cli.doctor.finding import Finding
from edge_runtime.errors import DependencyError, EdgeRuntimeError, ModelNotFoundError

# ggml's name of a CPU feature -> Linux's, and whether inference is several times slower without it.
_FEATURES = {
    "avx": ("avx", True),
    "avx2": ("avx2", True),
    "f16c": ("f16c", True),
    "fma": ("fma", True),
    "bmi2": ("bmi2", False),
    "avx_vnni": ("avx_vnni", False),
    "avx512": ("avx512f", False),
    "avx512_vbmi": ("avx512vbmi", False),
    "avx512_vnni": ("avx512_vnni", False),
    "avx512_bf16": ("avx512_bf16", False),
    "amx_int8": ("amx_int8", False),
    "neon": ("asimd", True),
    "dotprod": ("asimddp", True),
    "fp16_va": ("asimdhp", False),
    "matmul_int8": ("i8mm", True),
    "sve": ("sve", False),
    "sme": ("sme", False),
}


def software() -> Iterator[Finding]:
    """Findings about everything that was installed."""
    yield _python()
    try:
        from edge_runtime.engine import ggml
    except DependencyError as error:
        yield Finding("llama-cpp-python", "its libraries do not load", "fault", str(error))
        return
    yield _version(ggml.LLAMA_CPP_PYTHON)
    yield _cpu_features(ggml.cpu_features(), ggml.LLAMA_CPP_PYTHON)
    yield _kernels(ggml.LLAMA_CPP_PYTHON)
    yield _trial()


def _python() -> Finding:
    bits = "64-bit" if sys.maxsize > 2**32 else "32-bit"
    system = platform.platform(terse=True)
    found = f"edge-runtime {__version__}, Python {platform.python_version()}, {bits}, {system}"
    if bits == "32-bit" or sys.byteorder != "little":
        return Finding("versions", found, "fault", "install a 64-bit little-endian operating system")
    return Finding("versions", found)


def _version(needed: str) -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        found = "of unknown version"
    if found != needed:
        advice = f"pip install llama-cpp-python=={needed}: the engine calls into exactly that version"
        return Finding("llama-cpp-python", found, "fault", advice)
    return Finding("llama-cpp-python", found)


def _rebuild(version: str) -> str:
    return (
        "build for this CPU: CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' pip install --force-reinstall "
        f"--no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={version}"
    )


def _cpu_features(compiled: dict[str, bool], version: str) -> Finding:
    used = [name for name, there in compiled.items() if there and name in _FEATURES]
    found = " ".join(used) or "none"
    flags = _cpu_flags()
    if not flags:
        return Finding("CPU features used", found)
    lacking = [name for name in used if _FEATURES[name][0] not in flags]
    if lacking:
        what = f"{found}; this CPU lacks {' '.join(lacking)}, so the kernels would crash"
        return Finding("CPU features used", what, "fault", _rebuild(version))
    unused = [name for name, (flag, _) in _FEATURES.items() if flag in flags and compiled.get(name) is False]
    if not unused:
        return Finding("CPU features used", found)
    level = "fault" if any(_FEATURES[name][1] for name in unused) else "note"
    return Finding(
        "CPU features used",
        f"{found}; this CPU has {' '.join(unused)} as well",
        "fault" if level == "fault" else "note",
        _rebuild(version),
    )


def _cpu_flags() -> frozenset[str]:
    """What Linux says the CPU can do; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(flags[0].split()) if flags else frozenset()


class _Feature(ctypes.Structure):
    """``struct ggml_backend_feature``."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


def _build_features() -> dict[str, str]:
    """What ggml's CPU backend says about its own build."""
    from edge_runtime.engine import ggml

    registry = ggml.backend_cpu_reg()
    address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_get_features")
    if not address:
        return {}
    features = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registry)
    found, index = {}, 0
    while features and features[index].name:
        found[features[index].name.decode()] = (features[index].value or b"").decode()
        index += 1
    return found


def _kernels(version: str) -> Finding:
    from edge_runtime.engine import ggml

    build = _build_features()
    repacks = ggml.repack_buffer_type() is not None
    parts = [
        "repacked weights" if repacks else "no repacked weights",
        "OpenMP" if build.get("OPENMP") == "1" else "ggml's own threads",
        *(["llamafile matrix products"] if build.get("LLAMAFILE") == "1" else []),
    ]
    found = f"ggml {_text(ggml.version())}: {', '.join(parts)}"
    if not repacks:
        return Finding("kernels", found, "note", f"prompts are read more slowly; {_rebuild(version)}")
    return Finding("kernels", found)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _trial() -> Finding:
    """Load the demo model in another process and let it write: the only proof that the kernels run."""
    from edge_runtime.cli.bench.measure import Task, measure
    from edge_runtime.model_store.paths import demo_model_path

    try:
        path = demo_model_path()
        result = measure(Task(os.fspath(path), None, (64,), 32, "repack"), lambda share: None)
    except ModelNotFoundError as error:
        return Finding("trial", "there is no demo model", "note", str(error))
    except EdgeRuntimeError as error:
        return Finding("trial", "the demo model does not run", "fault", str(error))
    return Finding(
        "trial",
        f"demo model: {result['decode']:.0f} tokens/s with {result['threads']} threads, "
        f"first token after {result['first_token_seconds']:.2f} s",
    )
