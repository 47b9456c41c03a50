"""From a cold process to the first token: ``python -m benchmarks.first_token SIDE MODEL THREADS``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_PROMPT = "Once upon a time there was a small computer that"


def seconds(side: str, path: Path, threads: int) -> float:
    """Start a new Python, load the model, and wait for its first token."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.first_token", side, str(path), str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        elapsed = time.perf_counter() - started
        if line.strip() != "first token":
            raise RuntimeError(f"{command} gave no token")
    return elapsed


def main(side: str, path: str, threads: int) -> None:
    """Print ``first token`` as soon as there is one."""
    if side == "ours":
        from edge_runtime.engine.engine import Engine, EngineOptions
        from edge_runtime.engine.sampling import SamplingParameters

        with Engine.load(path, EngineOptions(threads=threads, context=1024)) as engine:
            next(engine.generate(_PROMPT, sampling=SamplingParameters(temperature=0), max_tokens=1))
            print("first token", flush=True)
    else:
        import llama_cpp

        options = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads}
        llama = llama_cpp.Llama(path, flash_attn=True, verbose=False, **options)
        llama(_PROMPT, max_tokens=1, temperature=0)
        print("first token", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
