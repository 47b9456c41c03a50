"""Minutes of good and bad clients against one daemon: ``python -m benchmarks.soak [--seconds 600]``.

Clients connect, stream, cancel, hang up in the middle, send garbage, overlong prompts, wrong tokens and half
requests, over HTTP and gRPC. Every good request must be answered once and rightly; memory and descriptors
must stay where they were; the daemon must still be ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import Report
from edge_runtime.client import AsyncClient
from edge_runtime.daemon import runtime_file
from edge_runtime.errors import EdgeRuntimeError

_CLIENTS = 12
_SAMPLE_SECONDS = 2.0
_WARM_UP_SHARE = 0.3  # until then every kind of request has come often, and pools have their size
_QUESTION = "The home of Paul Colton is in"


class Outcomes:
    """What clients saw.

    Attributes:
        counts: by kind of client and outcome.
        faults: what must not happen, in words; the first few.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def saw(self, kind: str, outcome: str, *, right: bool) -> None:
        """Count; note it where it is not right."""
        self.counts[f"{kind}: {outcome}"] += 1
        if not right and len(self.faults) < 20:
            self.faults.append(f"{kind}: {outcome}")


class Clients:
    """All kinds of clients of one daemon. Each method is one visit."""

    def __init__(self, address: str, grpc: str, expected: str, outcomes: Outcomes, seed: int) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._grpc = AsyncClient(grpc)
        self._expected = expected
        self._outcomes = outcomes
        self._random = random.Random(seed)
        self.visits: list[Callable[[], Awaitable[None]]] = [
            self.good_http,
            self.good_stream,
            self.good_grpc,
            self.hang_up,
            self.cancel_grpc,
            self.garbage,
            self.wrong_body,
            self.overlong,
            self.wrong_token,
            self.half_request,
            self.half_closed,
        ]

    async def visit(self) -> None:
        """One visit of a random kind."""
        await self._random.choice(self.visits)()

    async def close(self) -> None:
        """Leave."""
        await self._grpc.close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
        lines = [f"POST {path} HTTP/1.1", f"host: {self._host}:{self._port}", "connection: close", *headers]
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def _ask(self, body: Any, *headers: str) -> tuple[int, bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._connection() as (reader, writer):
            writer.write(self._request(raw, *headers))
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(), 60)
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, content

    def _completion(self, **extra: Any) -> dict[str, Any]:
        return {"prompt": _QUESTION, "temperature": 0, "max_tokens": 8, **extra}

    async def good_http(self) -> None:
        status, content = await self._ask(self._completion())
        if status == 429:
            self._outcomes.saw("http", "429", right=True)
            return
        text = json.loads(content)["choices"][0]["text"] if status == 200 else ""
        self._outcomes.saw("http", str(status), right=text == self._expected)

    async def good_stream(self) -> None:
        status, content = await self._ask(self._completion(stream=True))
        events = [line[6:] for line in content.splitlines() if line.startswith(b"data: ")]
        texts = [json.loads(event)["choices"][0]["text"] for event in events if event.startswith(b"{")]
        right = status == 429 or ("".join(texts) == self._expected and events.count(b"[DONE]") == 1)
        self._outcomes.saw("stream", str(status), right=right)

    async def good_grpc(self) -> None:
        try:
            stream = await self._grpc.generate(_QUESTION, temperature=0, max_tokens=8)
            text = await stream.text()
            self._outcomes.saw("grpc", "ok", right=text == self._expected)
        except EdgeRuntimeError as error:
            self._outcomes.saw("grpc", error.code, right=error.code == "overloaded")

    def _long(self) -> dict[str, Any]:
        return self._completion(temperature=50, top_k=0, top_p=1, min_p=0, max_tokens=300, stream=True)

    async def hang_up(self) -> None:
        async with self._connection() as (reader, writer):
            writer.write(self._request(json.dumps(self._long()).encode()))
            await writer.drain()
            await reader.read(self._random.choice((1, 400, 2000)))
            if self._random.random() < 0.5:
                writer.transport.abort()
        self._outcomes.saw("hang up", "done", right=True)

    async def cancel_grpc(self) -> None:
        try:
            stream = await self._grpc.generate(
                _QUESTION, temperature=50, top_k=0, top_p=1.0, min_p=0, max_tokens=300
            )
            async for _ in stream:
                break
            stream.close()
            self._outcomes.saw("cancel", "done", right=True)
        except EdgeRuntimeError as error:
            self._outcomes.saw("cancel", error.code, right=error.code == "overloaded")

    async def garbage(self) -> None:
        async with self._connection() as (reader, writer):
            writer.write(self._random.randbytes(self._random.randrange(1, 3000)) + b"\r\n\r\n")
            with contextlib.suppress(OSError):
                await writer.drain()
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(), 30)
                self._outcomes.saw("garbage", "answered", right=b"Traceback" not in answer)

    async def wrong_body(self) -> None:
        body: Any = self._random.choice(
            (
                b"{",
                b"[]",
                b'{"prompt": 5}',
                {"prompt": "x", "max_tokens": -1},
                {"messages": "x"},
                b"\xff" * 99,
            )
        )
        status, content = await self._ask(body)
        self._outcomes.saw("wrong body", str(status), right=status == 400 and b"Traceback" not in content)

    async def overlong(self) -> None:
        status, _ = await self._ask(self._completion(prompt="word " * self._random.choice((600, 20000))))
        self._outcomes.saw("overlong", str(status), right=status == 400)

    async def wrong_token(self) -> None:
        status, _ = await self._ask(self._completion(), "authorization: Bearer edgert_wrong")
        self._outcomes.saw("wrong token", str(status), right=status in (401, 429))

    async def half_request(self) -> None:
        whole = self._request(json.dumps(self._completion()).encode())
        async with self._connection() as (_, writer):
            writer.write(whole[: self._random.randrange(1, len(whole) - 1)])
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(self._random.random() * 0.2)
        self._outcomes.saw("half request", "done", right=True)

    async def half_closed(self) -> None:
        async with self._connection() as (reader, writer):
            writer.write(self._request(json.dumps(self._completion(stream=True)).encode()))
            writer.write_eof()  # sends nothing more, but reads on
            answer = await asyncio.wait_for(reader.read(), 60)
        # Whether such a client counts as gone is the server's choice; half an answer is not.
        right = not answer or b"[DONE]" in answer or b" 429 " in answer[:20]
        self._outcomes.saw("half closed", "answered" if answer else "closed", right=right)


class Samples:
    """The daemon's memory and descriptors over time."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.memory: list[int] = []
        self.descriptors: list[int] = []

    async def take(self) -> None:
        """Sample until cancelled."""
        while True:
            self.memory.append(self._process.memory_info().rss)
            self.descriptors.append(self._process.num_fds())
            await asyncio.sleep(_SAMPLE_SECONDS)

    def growth(self, values: list[int]) -> tuple[float, float]:
        """Medians of the first and the last quarter after the warm-up."""
        rest = values[int(_WARM_UP_SHARE * len(values)) :]
        quarter = max(1, len(rest) // 4)
        return statistics.median(rest[:quarter]), statistics.median(rest[-quarter:])


async def _soak(process: psutil.Process, http: str, grpc: str, seconds: float, outcomes: Outcomes) -> Samples:
    probe = AsyncClient(grpc)
    expected = await (await probe.generate(_QUESTION, temperature=0, max_tokens=8)).text()
    await probe.close()
    samples = Samples(process)
    sampling = asyncio.create_task(samples.take())
    end = time.monotonic() + seconds

    async def one(seed: int) -> None:
        clients = Clients(http, grpc, expected, outcomes, seed)
        while time.monotonic() < end:
            try:
                await clients.visit()
            except (OSError, TimeoutError) as error:
                outcomes.saw("connection", type(error).__name__, right=False)
        await clients.close()

    await asyncio.gather(*(one(seed) for seed in range(_CLIENTS)))
    await asyncio.sleep(2)
    samples.descriptors.append(process.num_fds())
    sampling.cancel()
    return samples


def _wait_for_daemon(home: Path, process: subprocess.Popen[bytes]) -> runtime_file.RunningDaemon:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        running = runtime_file.read(home)
        if running is not None:
            return running
        time.sleep(0.05)
    raise RuntimeError(f"the daemon did not start (exit status {process.poll()})")


def soak(report: Report, seconds: float, threads: int) -> None:
    """Run the clients and judge."""
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        command = [sys.executable, "-m", "edge_runtime.cli", "serve", "-t", str(threads)]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log-file", str(home / "log")]
        with subprocess.Popen(command, env={**os.environ, "EDGERT_HOME": folder}) as process:
            try:
                running = _wait_for_daemon(home, process)
                watched = psutil.Process(process.pid)
                samples = asyncio.run(_soak(watched, running.http, running.grpc, seconds, outcomes))
                status = asyncio.run(_status(running.grpc))
                ended = "it lives" if process.poll() is None else f"exit status {process.returncode}"
            finally:
                process.terminate()
        log = (home / "log").read_text()
    first, last = samples.growth(samples.memory)
    files_first, files_last = samples.growth(samples.descriptors)
    report.details["visits"] = dict(sorted(outcomes.counts.items()))
    report.details["faults"] = outcomes.faults
    report.details["memory, MB"] = {"first quarter": first / 1e6, "last quarter": last / 1e6}
    report.details["descriptors"] = {"first quarter": files_first, "last quarter": files_last}
    report.at_most("memory at the end, x that after warming up", last / first, 1.02)
    report.at_most("open descriptors at the end beyond those after warming up", files_last - files_first, 8)
    report.at_most("requests lost, answered twice or wrongly", len(outcomes.faults), 0)
    report.at_most("tracebacks in the log", log.count("Traceback"), 0)
    report.is_true("the daemon is still ready", status and ended == "it lives")


async def _status(grpc: str) -> bool:
    client = AsyncClient(grpc)
    try:
        status = await client.status()
        return bool(status.ready) and not status.requests
    finally:
        await client.close()


def main() -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    report = Report("soak")
    soak(report, options.seconds, options.threads)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
