"""The peer distributed-llama in a lab: tensor parallelism over TCP, one thread and one core a host.

``python -m benchmarks.peer_distributed_llama [--quick]``. Its source, a checkout of b4rtaz/distributed-llama
(measured at commit 8d624a7), is looked for in $DISTRIBUTED_LLAMA or a cache folder, and compiled there.
The model has the shape of TinyLlama-1.1B in Q4_0 and random weights, in the peer's own file format.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final

import numpy as np

from benchmarks.netlab import Host, LinkModel, Netlab
from benchmarks.report import Report

CACHE: Final = Path.home() / ".cache" / "edgert-bench" / "distributed-llama"
_PORT: Final = 9999
_PATIENCE: Final = 120.0  # seconds without a token, after which a measurement has failed
_TOKEN_LINE: Final = "🔶 Pred".encode()
_WARM_UP: Final = 2  # first tokens, which page the weights in

# The peer's file format: its keys of the header, and its numbers for what they name.
_MODEL_MAGIC: Final = 0xA00ABCD
_TOKENIZER_MAGIC: Final = 0x567124
_LLAMA, _SILU, _Q40 = 0xABCD00, 1, 2


@dataclass(frozen=True, slots=True)
class PeerModel:
    """The shape of a LLaMA model; the default is TinyLlama-1.1B's."""

    n_layers: int = 22
    n_embd: int = 2048
    n_ff: int = 5632
    n_head: int = 32
    n_head_kv: int = 4
    n_vocab: int = 32000
    n_ctx: int = 2048


def build() -> Path:
    """The compiled program.

    Raises:
        FileNotFoundError: there is no source to compile.
        RuntimeError: it does not compile.
    """
    source = Path(os.environ.get("DISTRIBUTED_LLAMA", CACHE / "source"))
    if not (source / "Makefile").is_file():
        raise FileNotFoundError(
            f"no source of distributed-llama in {source}; put a checkout of b4rtaz/distributed-llama there "
            "or name one in DISTRIBUTED_LLAMA"
        )
    program = source / "dllama"
    if not program.exists():
        done = subprocess.run(["make", "dllama"], cwd=source, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"distributed-llama does not compile in {source}: {done.stderr[-2000:]}")
    return program


def make_model(path: Path, model: PeerModel | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write a model of random weights and its tokenizer, unless both are there.

    Args:
        path: of the model; the tokenizer lies beside it, with the suffix .t.

    Returns:
        Both paths.
    """
    tokenizer = path.with_suffix(".t")
    if path.exists() and tokenizer.exists():
        return path, tokenizer
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model or PeerModel()
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        _write_model(file, model, np.random.default_rng(seed))
    with tokenizer.open("wb") as file:
        _write_tokenizer(file, model.n_vocab)
    unfinished.rename(path)
    return path, tokenizer


def _header(magic: int, fields: Sequence[tuple[int, int]]) -> bytes:
    content = b"".join(struct.pack("<ii", *field) for field in fields)
    return struct.pack("<ii", magic, 8 + len(content)) + content


def _write_model(file: IO[bytes], model: PeerModel, random: np.random.Generator) -> None:
    fields = [
        (0, 0),  # version
        (1, _LLAMA),
        (2, model.n_embd),
        (3, model.n_ff),
        (4, model.n_layers),
        (5, model.n_head),
        (6, model.n_head_kv),
        (7, 0),  # experts
        (8, 0),
        (9, model.n_vocab),
        (10, model.n_ctx),
        (11, _SILU),
        (12, 10_000),  # rope's theta
        (13, _Q40),
    ]
    file.write(_header(_MODEL_MAGIC, fields))
    embedding = random.standard_normal(model.n_vocab * model.n_embd, dtype=np.float32)
    file.write((embedding * np.float32(0.02)).tobytes())
    width, kv_width = model.n_embd, model.n_embd // model.n_head * model.n_head_kv
    norm = np.ones(width, np.float32).tobytes()
    for _ in range(model.n_layers):
        for rows, columns in (
            (width, width),
            (kv_width, width),
            (kv_width, width),
            (width, width),
            (model.n_ff, width),
            (width, model.n_ff),
            (model.n_ff, width),
        ):
            file.write(_random_q40(rows * columns, random))
        file.write(norm + norm)
    file.write(norm)
    file.write(_random_q40(model.n_vocab * width, random))


def _random_q40(count: int, random: np.random.Generator) -> bytes:
    # Blocks of 32 values: a half-precision scale, then 4 bits a value. Uniform nibbles times this scale have
    # a standard deviation of 0.02, as trained weights of this width do.
    blocks = random.integers(0, 256, (count // 32, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.0043).tobytes(), np.uint8)
    return blocks.tobytes()


def _write_tokenizer(file: IO[bytes], n_vocab: int) -> None:
    words = [bytes([value]) for value in range(1, 256)]
    words += [b"<%d>" % number for number in range(n_vocab - len(words))]
    fields = [(0, 1), (1, n_vocab), (2, max(map(len, words))), (3, n_vocab - 2), (9, 1), (10, 1)]
    file.write(_header(_TOKENIZER_MAGIC, fields) + struct.pack("<i", n_vocab - 1))
    for word in words:
        file.write(struct.pack("<fI", 0.0, len(word)) + word)


def measure(
    lab: Netlab,
    root: str = "a",
    worker: str | None = "b",
    tokens: int = 64,
    model: Path | None = None,
    when_warm: Callable[[], object] | None = None,
) -> list[float]:
    """Milliseconds between one token and the next, as they come out of the root.

    Args:
        lab: whose hosts `root` and `worker` run it, on whatever cores they are pinned to.
        worker: None is the root alone.
        tokens: how many times are returned; a few tokens before them are not counted.
        model: made by `make_model`; None is the default one in the cache folder.
        when_warm: called once, when the first of the counted times begins. The weights have gone over the
            network by then; a link that is set only here makes that quick.

    Raises:
        RuntimeError: the program failed, or no token came for two minutes.
    """
    program = build()
    path, tokenizer = make_model(model or CACHE / "tinyllama-q40.m")
    threads: list[str | Path] = ["--nthreads", "1"]
    processes = []
    if worker is not None:
        words = [program, "worker", *threads, "--port", str(_PORT)]
        processes.append(
            lab.run(worker, words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=program.parent)
        )
        _wait_until_it_listens(processes[0])
    words = [program, "inference", *threads, "--model", path, "--tokenizer", tokenizer]
    words += ["--buffer-float-type", "q80", "--max-seq-len", "512", "--seed", "1", "--temperature", "0"]
    words += ["--prompt", "abcd", "--steps", str(tokens + _WARM_UP + 6)]
    if worker is not None:
        words += ["--workers", f"{lab.address(worker)}:{_PORT}"]
    processes.append(
        lab.run(root, words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=program.parent)
    )
    try:
        return _token_times(processes[-1], tokens, when_warm)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes]) -> None:
    # It says so nowhere, but the kernel does: its table of sockets has the port and the state LISTEN (0A).
    sockets = Path(f"/proc/{process.pid}/net/tcp")
    deadline = time.monotonic() + 10.0
    while process.poll() is None and time.monotonic() < deadline:
        words = [line.split() for line in sockets.read_text().splitlines()]
        if any(line[1].endswith(f":{_PORT:04X}") and line[3] == "0A" for line in words):
            return
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"the worker of distributed-llama does not listen; status {process.wait()}")


def _token_times(
    process: subprocess.Popen[bytes], tokens: int, when_warm: Callable[[], object] | None
) -> list[float]:
    assert process.stdout is not None
    output: list[bytes] = []
    arrivals: list[float] = []
    watchdog = threading.Timer(_PATIENCE, process.kill)
    watchdog.start()
    with process.stdout as stream:
        for line in stream:
            output = [*output[-20:], line]
            if line.startswith(_TOKEN_LINE):
                arrivals.append(time.monotonic())
                watchdog.cancel()
                if len(arrivals) == _WARM_UP + 1 and when_warm is not None:
                    when_warm()
                if len(arrivals) == tokens + _WARM_UP + 1:
                    break
                watchdog = threading.Timer(_PATIENCE, process.kill)
                watchdog.start()
    watchdog.cancel()
    if len(arrivals) < tokens + _WARM_UP + 1:
        said = b"".join(output).decode(errors="replace")
        raise RuntimeError(f"distributed-llama gave {len(arrivals)} tokens, then: {said}")
    counted = arrivals[_WARM_UP:]
    return [1000.0 * (later - earlier) for earlier, later in itertools.pairwise(counted)]


def main() -> int:
    """Measure it alone, on a clean network and on one with delay and loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    tokens = 24 if parser.parse_args().quick else 128
    report = Report("peer_distributed_llama")
    hosts = [Host("a", core=0), Host("b", core=1)]
    far = {loss: LinkModel(delay=0.002, jitter=0.0005, loss=loss, seed=1) for loss in (0.0, 0.01, 0.02, 0.05)}
    networks = {"clean": LinkModel()} | {f"2 ms, loss {loss:.0%}": link for loss, link in far.items()}
    for name, link in [("alone", LinkModel()), *networks.items()]:
        with Netlab(hosts, link=link) as lab:
            # The weights went through the switch as well; they are not counted.
            forget = partial(lab.switch_report, anew=True)
            worker = None if name == "alone" else "b"
            times = measure(lab, worker=worker, tokens=tokens, when_warm=forget)
            switch = lab.switch_report()
        seconds = sum(times) / 1000.0
        report.details[name] = {
            "p50": statistics.median(times),
            "mean": statistics.fmean(times),
            "p95": sorted(times)[int(0.95 * len(times))],
            "p99": sorted(times)[int(0.99 * len(times))],
            "switch": switch["switch"],
            "switch_share_of_a_core": switch["cpu_seconds"] / seconds,
            "packets_per_token": switch["packets"] / tokens,
            "lateness": switch["lateness"],
        }
        report.note(f"{name}: {report.details[name]}")
    return report.finish()


if __name__ == "__main__":
    if shutil.which("make") is None:
        sys.exit("distributed-llama is compiled by make, which is not installed")
    sys.exit(main())
