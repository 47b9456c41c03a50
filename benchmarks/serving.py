"""The daemon beside llama_cpp.server, same file and threads: ``python -m benchmarks.serving [--quick]``.

Both servers run all the time and take turns at being asked. Clients stream completions one after the other;
each prompt differs from its first token on, so that neither side can reuse another's prefix.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.engine import tiny_llama
from benchmarks.report import Report

_REQUESTS = {1: 3, 2: 2, 4: 2, 8: 1}  # by number of clients, of each of them
_PROMPT_WORDS = 5  # about 35 tokens
_TOKENS = 96
_CONTEXT = 256
_numbers = itertools.count()


class Outcome(NamedTuple):
    """One client's request: seconds to the first token, and tokens received."""

    first_token: float
    tokens: int


def ask(port: int, model: str) -> Outcome:
    """Stream one completion.

    Raises:
        RuntimeError: the server answers something else.
    """
    number = next(_numbers)
    prompt = " ".join(f"{number * 7919 + word * 104729:x}" for word in range(_PROMPT_WORDS))
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": _TOKENS,
        "temperature": 0.0,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    first = 0.0
    events = 0
    finish = None
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        choice = json.loads(line[6:]).get("choices", [{}])[0]
        if not first:
            first = time.perf_counter() - started
        finish = choice.get("finish_reason") or finish
        events += 1
    connection.close()
    if response.status != 200 or finish not in ("length", "stop"):
        raise RuntimeError(f"status {response.status}, finished by {finish!r} after {events} events")
    # Random weights end an answer now and then; there is about one event a token.
    return Outcome(first, _TOKENS if finish == "length" else events)


class Turn(NamedTuple):
    """What some clients saw together."""

    tokens_per_second: float
    first_tokens: list[float]


def together(port: int, model: str, clients: int, requests: int) -> Turn:
    """`clients` clients at once, each with `requests` requests one after the other."""
    outcomes: list[Outcome] = []
    faults: list[BaseException] = []

    def client() -> None:
        try:
            for _ in range(requests):
                outcomes.append(ask(port, model))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    if faults:
        raise faults[0]
    return Turn(sum(one.tokens for one in outcomes) / elapsed, [one.first_token for one in outcomes])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _process(command: list[str], port: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env={**os.environ, **environment}) as process:
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _ours(path: Path, threads: int, home: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = _free_port()
    settings = home / "edgert.toml"
    settings.write_text(
        f'[server]\nhttp = "127.0.0.1:{port}"\ngrpc = "127.0.0.1:0"\n'
        f'[model]\ndefault = "{path}"\nthreads = {threads}\ncontext = {_CONTEXT}\n'
        # Not asked for a while, it would compute a token to see whether it can: not while the other is timed.
        "[scheduling]\nready_seconds = 3600\n"
    )
    command = [sys.executable, "-m", "edge_runtime.cli", "serve", "--config", str(settings)]
    with _process(command, port, {"EDGERT_HOME": str(home)}) as process:
        yield port, process


@contextmanager
def _theirs(path: Path, threads: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = _free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_ctx", str(_CONTEXT)]
    with _process([*command, "--flash_attn", "true", "--interrupt_requests", "false"], port, {}) as process:
        yield port, process


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def compare(report: Report, path: Path, threads: int, rounds: int) -> None:
    """Throughput and time to first token with 1, 2, 4 and 8 clients."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours, _ = stack.enter_context(_ours(path, threads, home))
        theirs, _ = stack.enter_context(_theirs(path, threads))
        ports = {"ours": (ours, ""), "llama_cpp.server": (theirs, "model")}
        turns: dict[tuple[str, int], list[Turn]] = {}
        for side, (port, model) in ports.items():  # the first request builds graphs and warms caches
            together(port, model, 1, 1)
            report.note(f"{side} answers")
        for _ in range(rounds):
            for clients in _REQUESTS:
                for side, (port, model) in ports.items():
                    turn = together(port, model, clients, _REQUESTS[clients])
                    turns.setdefault((side, clients), []).append(turn)
    details = {}
    for (side, clients), found in turns.items():
        waits = [wait for turn in found for wait in turn.first_tokens]
        details[f"{side}, {clients} clients"] = {
            "tokens/s": statistics.median(turn.tokens_per_second for turn in found),
            "first token p50": _percentile(waits, 0.5),
            "first token p95": _percentile(waits, 0.95),
        }
    report.details[f"{threads} threads"] = details
    bars = {1: 0.97, 4: 1.8}
    for clients in _REQUESTS:
        ratio = statistics.median(
            mine.tokens_per_second / other.tokens_per_second
            for mine, other in zip(turns["ours", clients], turns["llama_cpp.server", clients], strict=True)
        )
        name = f"throughput with {clients} clients at {threads} threads, x llama_cpp.server"
        if clients in bars:
            report.at_least(name, ratio, bars[clients])
        else:
            details[f"{clients} clients, x llama_cpp.server"] = ratio  # type: ignore[assignment]


_ENGINE_ALONE = """
import sys, threading
from edge_runtime.engine.engine import Engine, EngineOptions
engine = Engine.load(sys.argv[1], EngineOptions(threads=1, context=int(sys.argv[2]), sequences=4))
decodings = [engine.decoding(list(range(5 + 100 * n, 80 + 100 * n)), max_tokens=48) for n in range(4)]
for decoding in decodings:
    engine.begin(decoding)
while any(decoding.finish_reason is None for decoding in decodings):
    engine.advance([decoding for decoding in decodings if decoding.finish_reason is None])
print("done", flush=True)
sys.stdin.read()
"""


def compare_memory(report: Report, path: Path) -> None:
    """What the daemon takes above an engine that does the same work, in MB of resident memory."""
    with tempfile.TemporaryDirectory() as home, _ours(path, 1, Path(home)) as (port, process):
        together(port, "", 4, 2)
        daemon = psutil.Process(process.pid).memory_info().rss
    command = [sys.executable, "-c", _ENGINE_ALONE, str(path), str(_CONTEXT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as alone:
        assert alone.stdout is not None
        alone.stdout.readline()
        engine = psutil.Process(alone.pid).memory_info().rss
        alone.kill()
    report.details["memory, MB"] = {"daemon": daemon / 1e6, "engine alone": engine / 1e6}
    report.at_most("memory of the daemon above the engine's, MB", (daemon - engine) / 1e6, 90)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, one thread")
    options = parser.parse_args()
    report = Report("serving")
    path = tiny_llama("Q4_0")
    compare_memory(report, path)
    for threads in (1,) if options.quick else (1, 2):
        compare(report, path, threads, 1 if options.quick else 3)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
