"""Measures one model with one number of threads, in a process of its own.

``python -m edge_runtime.cli.bench.measure TASK STARTED`` with a JSON :class:`Task` and the Unix time at which
the process was started. Standard output has one JSON object a line: ``{"share": ...}`` while it works, then
``{"result": ...}`` or ``{"error": ...}``. A process of its own has its own peak memory, starts cold, and may
crash.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import EdgeRuntimeError, OutOfMemoryError

if TYPE_CHECKING:
    from edge_runtime.engine.engine import Engine

_SHORT_PROMPT = 16  # tokens before the first token, and before decoding
_PREFILL_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """What to measure.

    Attributes:
        threads: None takes the engine's own choice.
        prefill: prompt lengths in tokens; those that the model's context cannot hold are left out.
        decode: tokens to generate.
        weights: as in EngineOptions.
    """

    path: str
    threads: int | None
    prefill: tuple[int, ...]
    decode: int
    weights: str


def measure(task: Task, progress: Callable[[float], None]) -> dict[str, Any]:
    """Run a task in a new process.

    Returns:
        ``threads``, ``context``, ``load_seconds``, ``first_token_seconds`` (from the start of the process,
        16-token prompt), ``prefill`` {tokens: tokens/s}, ``decode`` (tokens/s), ``peak_bytes``.

    Raises:
        OutOfMemoryError: the system ended the process.
        EdgeRuntimeError: it failed, with its own message.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(task)), repr(time.time())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "share" in message:
                    progress(message["share"])
                elif "error" in message:
                    raise EdgeRuntimeError(message["error"])
                else:
                    result: dict[str, Any] = message["result"]
                    return result
        finally:
            process.stdout.close()
            process.terminate()
    code = process.returncode
    if code == -signal.SIGKILL:
        raise OutOfMemoryError("the system ended the measurement: too little memory; try --weights mmap")
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise EdgeRuntimeError(f"the measurement died ({how}); `edgert doctor` looks for the reason")


def _measure_here(task: Task, process_started: float, progress: Callable[[float], None]) -> dict[str, Any]:
    from edge_runtime.engine.engine import Engine, EngineOptions

    weights: Any = task.weights
    started = time.perf_counter()
    with Engine.load(task.path, EngineOptions(threads=task.threads, weights=weights)) as engine:
        load_seconds = time.perf_counter() - started
        _run(engine, min(_SHORT_PROMPT, engine.context // 2))
        first_token_seconds = time.time() - process_started
        lengths = [length for length in task.prefill if length <= engine.context]
        steps = len(lengths) + 1
        speeds = {}
        for number, length in enumerate(lengths):
            seconds = [_run(engine, length) for _ in range(_PREFILL_REPEATS)]
            speeds[length] = length / statistics.median(seconds)
            progress((number + 1) / steps)
        decode = _decode(engine, task.decode, lambda share: progress((steps - 1 + share) / steps))
        return {
            "threads": engine.threads,
            "context": engine.context,
            "load_seconds": load_seconds,
            "first_token_seconds": first_token_seconds,
            "prefill": speeds,
            "decode": decode,
            "peak_bytes": _peak_bytes(),
        }


def _run(engine: Engine, length: int) -> float:
    """Seconds for a prompt of so many tokens from an empty cache to the choice of the next token."""
    import numpy as np

    from edge_runtime.engine.batch import Batch
    from edge_runtime.engine.sampling import Sampler, SamplingParameters

    n_vocab = engine.hyperparameters.n_vocab
    sampler = Sampler(SamplingParameters(seed=0), n_vocab)
    tokens = [int(token) for token in np.random.default_rng(length).integers(0, n_vocab, length)]
    engine.model.cells.remove(0)
    started = time.perf_counter()
    size = engine.options.batch
    for start in range(0, length, size):
        chunk = tokens[start : start + size]
        positions = np.arange(start, start + len(chunk), dtype=np.int32)
        wanted = [len(chunk) - 1] if start + size >= length else []
        result = engine.model.forward(Batch(chunk, positions, 0, wanted))
    sampler.sample(result.logits[0])
    return time.perf_counter() - started


def _decode(engine: Engine, count: int, progress: Callable[[float], None]) -> float:
    """Tokens a second after a short prompt, sampling included: the median of single steps."""
    import numpy as np

    from edge_runtime.engine.batch import Batch
    from edge_runtime.engine.sampling import Sampler, SamplingParameters

    prompt = min(_SHORT_PROMPT, engine.context // 2)
    _run(engine, prompt)
    sampler = Sampler(SamplingParameters(seed=0), engine.hyperparameters.n_vocab)
    token, seconds = 0, []
    count = min(count, engine.context - prompt)
    for step in range(count):
        started = time.perf_counter()
        batch = Batch([token], np.array([prompt + step], np.int32), 0, [0])
        token = sampler.sample(engine.model.forward(batch).logits[0])
        seconds.append(time.perf_counter() - started)
        progress((step + 1) / count)
    return 1 / statistics.median(seconds)


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    arguments = json.loads(sys.argv[1])
    task = Task(**{**arguments, "prefill": tuple(arguments["prefill"])})
    last_said = 0.0

    def say(share: float) -> None:
        nonlocal last_said
        if time.monotonic() - last_said > 0.1:  # a line costs time that is being measured
            last_said = time.monotonic()
            print(json.dumps({"share": share}), flush=True)

    try:
        print(json.dumps({"result": _measure_here(task, float(sys.argv[2]), say)}), flush=True)
    except EdgeRuntimeError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)  # the parent says it


if __name__ == "__main__":
    _main()
