"""Runs damaged model files one after another in a process of its own: ``python fuzz_worker.py CASE_FILE``.

Reads cases from stdin (8 bytes of length, 1 byte saying whether to run the engine, the file), writes each
to CASE_FILE, and answers with one line: ``ok``, ``refused ERROR_CLASS``, or ``WRONG`` and a traceback.
After an abort, CASE_FILE holds the case that caused it. Address space is limited to 1 GiB more than
the libraries need, so an allocation without bound fails.
"""

import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_runtime.engine.architecture import check_tensors, read_hyperparameters
from edge_runtime.engine.engine import Engine, EngineOptions
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import EdgeRuntimeError

TEXT = "Hello <s> wörld </s>\n\n  1234 🙂\0!? <|endoftext|>"
HEADROOM = 1 << 30


def read_model(path: Path) -> None:
    """Everything that looks at a file before weights are loaded."""
    with GGUFFile(path) as gguf:
        for value in gguf.metadata.values():
            assert value is not None
        for name, record in gguf.tensors.items():
            assert len(gguf.tensor_bytes(name)) == record.size
        problem: EdgeRuntimeError | None = None
        try:
            check_tensors(gguf, read_hyperparameters(gguf))
        except EdgeRuntimeError as error:
            problem = error
        # A vocabulary is tried even where the rest of the file is wrong.
        tokenizer = Tokenizer(gguf)
        try:
            for parse_special in (False, True):
                tokens = tokenizer.encode(TEXT, parse_special=parse_special)
                assert all(0 <= token < tokenizer.n_vocab for token in tokens)
                tokenizer.decode(tokens)
            for token in {0, tokenizer.n_vocab // 2, tokenizer.n_vocab - 1}:
                tokenizer.token_bytes(token, special=True)
                tokenizer.is_end(token)
        finally:
            tokenizer.close()
        if problem is not None:
            raise problem


def run_engine(path: Path) -> None:
    """Load the model and write two tokens."""
    with Engine.load(path, EngineOptions(threads=1, batch=16)) as engine:
        generation = engine.generate(TEXT[:12], max_tokens=2)
        generation.text()
        assert generation.generated_tokens <= 2


def address_space() -> int:
    """Bytes of address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def answer(path: Path, run: Callable[[Path], None]) -> str:
    try:
        with np.errstate(all="ignore"):
            run(path)
    except EdgeRuntimeError as error:
        return f"refused {type(error).__name__}"
    except BaseException:
        return "WRONG " + traceback.format_exc().replace("\n", "\\n")
    return "ok"


def main() -> None:
    path = Path(sys.argv[1])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + HEADROOM, hard))
    while head := sys.stdin.buffer.read(9):
        path.write_bytes(sys.stdin.buffer.read(int.from_bytes(head[:8], "little")))
        print(answer(path, run_engine if head[8] else read_model), flush=True)


if __name__ == "__main__":
    main()
