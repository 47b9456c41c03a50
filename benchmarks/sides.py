"""Our engine and llama.cpp behind one interface, each in a process of its own, so that they can take turns.

Run as ``python -m benchmarks.sides SIDE MODEL THREADS CONTEXT SEQUENCES``; reads commands from standard
input, one a line, and answers each with one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

SideName = Literal["ours", "llama.cpp"]


class Side(Protocol):
    """What is timed. Token ids do not matter for speed, so they are made up."""

    def clear(self) -> None:
        """Empty the KV cache."""

    def step(self, tokens: list[int], position: int, n_sequences: int) -> NDArray[np.float32]:
        """Run tokens from `position` on in each of the first `n_sequences`; logits of the last row."""


class Ours:
    """The project's engine, through `Model.forward`."""

    def __init__(self, path: Path, threads: int, context: int, n_sequences: int) -> None:
        from edge_runtime.engine.engine import Engine, EngineOptions

        options = EngineOptions(threads=threads, context=context, sequences=n_sequences)
        self._model = Engine.load(path, options).model
        self._n_sequences = n_sequences

    def clear(self) -> None:
        for sequence in range(self._n_sequences):
            self._model.cells.remove(sequence)

    def step(self, tokens: list[int], position: int, n_sequences: int) -> NDArray[np.float32]:
        from edge_runtime.engine.batch import Batch

        positions = np.tile(np.arange(position, position + len(tokens), dtype=np.int32), n_sequences)
        sequences = np.repeat(np.arange(n_sequences, dtype=np.int32), len(tokens))
        wanted = [(sequence + 1) * len(tokens) - 1 for sequence in range(n_sequences)]
        batch = Batch(tokens * n_sequences, positions, sequences, wanted)
        logits: NDArray[np.float32] = self._model.forward(batch).logits[-1]
        return logits


class LlamaCpp:
    """llama.cpp through its C interface: no Python of its wrapper between the calls that are timed."""

    def __init__(self, path: Path, threads: int, context: int, n_sequences: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context * n_sequences
        parameters.n_seq_max = n_sequences
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, n_sequences)

    def clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def step(self, tokens: list[int], position: int, n_sequences: int) -> NDArray[np.float32]:
        batch, row = self._batch, 0
        for sequence in range(n_sequences):
            for index, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = position + index
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = index == len(tokens) - 1
                row += 1
        batch.n_tokens = row
        status = self._c.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._c.llama_get_logits_ith(self._context, row - 1)
        return np.ctypeslib.as_array(logits, shape=(self._n_vocab,)).copy()


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _measure(side: Side, command: list[str]) -> dict[str, Any]:
    """Answer one command.

    ``prefill N``: seconds for N tokens. ``decode N S``: median seconds of N steps of S sequences, after a
    prefix of 32 tokens. ``memory``: peak bytes of this process so far.
    """
    if command[0] == "memory":
        return {"bytes": _peak_bytes()}
    side.clear()
    count = int(command[1])
    tokens = [3 + (7 * index) % 250 for index in range(max(count, 32))]
    if command[0] == "prefill":
        started = time.perf_counter()
        side.step(tokens[:count], 0, 1)
        return {"seconds": time.perf_counter() - started}
    n_sequences = int(command[2])
    side.step(tokens[:32], 0, n_sequences)
    times = []
    for index in range(count):
        started = time.perf_counter()
        side.step([tokens[index % 32]], 32 + index, n_sequences)
        times.append(time.perf_counter() - started)
    return {"seconds": float(np.median(times))}


class SideProcess:
    """One side in its own process."""

    def __init__(
        self, side: SideName, path: Path, *, threads: int, context: int = 1024, n_sequences: int = 1
    ) -> None:
        arguments = [side, str(path), str(threads), str(context), str(n_sequences)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side of the benchmark ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(arguments: list[str]) -> None:
    """Serve one side on standard input and output."""
    name, path, threads, context, n_sequences = arguments
    kinds: dict[str, Callable[[Path, int, int, int], Side]] = {"ours": Ours, "llama.cpp": LlamaCpp}
    side = kinds[name](Path(path), int(threads), int(context), int(n_sequences))
    side.step([3, 4, 5], 0, 1)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_measure(side, line.split())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
