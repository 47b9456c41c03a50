"""The tutorials' commands do what the tutorials say.

Of a page, two kinds of blocks count:

- ```python blocks whose first line is ``# NAME.py`` are written to that file.
- ```console blocks are run: lines that begin with ``$ `` are commands, those after them what is expected,
  standard error included. All of a page's commands run in order in one bash, in an empty folder, with an
  empty store.

A page about several devices writes a device's name before the ``$``: ``laptop$ edgert ps``. Each is a bash
with a home and ports of its own on loopback; the page shows `ADDRESSES` instead. An invitation that a page
shortens to ``edgert1.…`` in a command is the last one that was printed.

A command ``edgert serve`` keeps its terminal, so it gets one of its own and goes on in the background. What
looks at the cluster (`LOOKS`) is run again until it shows what the page shows: devices take a moment to meet.

``…`` in an expected line stands for anything in that line, on a line of its own for any lines. What differs
with every run (see `VARYING`) is replaced by one word on both sides. The ports of the text are replaced by
free ones in commands, and back in what comes out. A command whose Python file imports a package that is not
installed is left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

import pytest
from program import REPOSITORY

PORTS = ("8420", "8421")
ADDRESSES = {"laptop": "192.168.1.20:8422", "shelf": "192.168.1.21:8422"}
LOOK_SECONDS = 60.0
LOOKS = ("edgert cluster status", "edgert cluster plan")
# Page -> files that it says its reader has.
GIVEN = {"cluster.md": {"model.gguf": "edge-demo-q8_0.gguf", "text.txt": "heldout.txt"}}
TEXT_HOME = "/home/pi"  # of whoever the tutorials' output was shown to
SECONDS = 30.0  # for one command, and for a daemon to be ready

# Pattern -> what stands for it.
VARYING = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "TIME"),
    (r"\d{4}-\d\d-\d\d( \d\d:\d\d)?", "DATE"),
    (r"\bprocess \d+", "process N"),
    (r"\bup \d[\d.]* (s|min|h)( \d+ (s|min))?", "up TIME"),
    (r"\b\d+ tokens/s", "N tokens/s"),
    (r"\b\d+ tokens at \d+/s", "N tokens at N/s"),
    (r"in \d+\.\d\d s \(\d+/s(, \d+ kept from before)?\)", "in TIME"),
    (r"\bseed \d+", "seed N"),
    (r"\b\d[\d.]* (kB|MB|GB)\b", "SIZE"),
    (r" · \d+ °C", ""),  # not every device has a thermometer
    (r"\b\d+ requests? ended", "N requests ended"),
    (r"\bseconds=[\d.]+", "seconds=N"),
    (r'"(chatcmpl|cmpl)-[0-9a-f]{8}-\d+"', r'"\1-ID"'),
    (r'"created":\d+', '"created":N'),
    (r'("cached_tokens"|"seed"|"pid"):\d+', r"\1:N"),
    (r"^(edgert_\w+(?:\{.*\})?) [-\d.e+]+$", r"\1 N"),
    (r" +\d+ °C ", " - "),
    (r"\b\d[\d.]* (ms|s)\b", "SPAN"),
    (r"[█▏▎▍▌▋▊▉▒░]+ *", "BAR "),
    (r"[+]?\b\d[\d.]* ?%", "N%"),
    (r"\bx\d[\d.]*", "N%"),
    (r"\bperplexity \d[\d.]*", "perplexity N"),
    (r"\bplan \d+", "plan N"),
    (r"\b\d[\d,]* (groups\b|on time|late|lost|recomputed|sent|received|asked again|waits?\b)", r"N \1"),
    (r"\bcontributions [\w%, ]+ ·", "contributions N ·"),
    (r"([0-9a-f]{2}:){31}[0-9a-f]{2}", "SHA-256"),
    (r"^# from EDGERT_\w+; default .*\n", ""),  # the test's own variables
)


@dataclass(slots=True)
class Step:
    """A command, or a file to be written.

    Attributes:
        line: of the page.
        expected: lines that it should print.
        file: name of the file whose text the command is; empty for a command.
        device: that it is for; empty where there is only one.
    """

    line: int
    command: str
    expected: list[str] = field(default_factory=list)
    file: str = ""
    device: str = ""


def steps(page: str) -> Iterator[Step]:
    """What a page wants to be done, in order."""
    kind, start, block = "", 0, list[str]()
    for number, line in enumerate(page.splitlines(), 1):
        if not line.startswith("```"):
            block.append(line)
        elif not kind:
            kind, start, block = line[3:].strip() or "plain", number, []
        else:
            if kind == "python" and block and (name := re.fullmatch(r"# (\w+\.py)", block[0])):
                yield Step(start, "\n".join(block) + "\n", file=name[1])
            elif kind == "console":
                yield from _commands(block, start)
            kind = ""


def _commands(block: list[str], start: int) -> Iterator[Step]:
    step: Step | None = None
    for number, line in enumerate(block, start + 1):
        if prompt := re.match(r"(\w*)\$ ", line):
            if step is not None:
                yield step
            step = Step(number, line[prompt.end() :], device=prompt[1])
        elif step is None:
            raise ValueError(f"line {number}: output without a command before it")
        elif step.command.endswith("\\") and not step.expected:
            step.command += f"\n{line}"
        else:
            step.expected.append(line)
    if step is not None:
        yield step


def normal(text: str) -> str:
    """A text without what differs from run to run; columns may have other widths."""
    for pattern, stand_in in VARYING:
        text = re.sub(pattern, stand_in, text, flags=re.MULTILINE)
    return "\n".join(re.sub(r"  +", " ", line).rstrip() for line in text.splitlines())


def matches(expected: list[str], found: str) -> bool:
    """Whether output is what a page shows."""
    pattern = ""
    for line in normal("\n".join(expected)).splitlines():
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(map(re.escape, line.split("…"))) + r"\n"
    return re.fullmatch(pattern, f"{normal(found)}\n" if found.strip() else "") is not None


class Session:
    """One bash on one device, and the daemons it started.

    Args:
        addresses: text -> what stands for it here, of all devices.
        name: of this device; empty where there is only one.
    """

    def __init__(self, folder: Path, addresses: dict[str, str], name: str) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._addresses = addresses
        self._listens = addresses[ADDRESSES[name]] if name else ""
        self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self._store = folder / "home" / ".local" / "share" / "edgert"
        self.work = folder / "work"
        self.work.mkdir()
        self._daemons: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._environment = self._make_environment()
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.work,
            env=self._environment,
        )
        self._output: Queue[bytes] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _make_environment(self) -> dict[str, str]:
        """Programs `edgert` and `python` of this test's Python; nothing of the user's settings.

        As long as there is no settings file, variables make the daemon listen at the free ports. The file
        that `edgert init` writes has the usual ones, which are replaced there.
        """
        programs = self._folder / "bin"
        programs.mkdir()
        http, grpc = (self._ports[port] for port in PORTS)
        settings = shlex.quote(str(self._store / "edgert.toml"))
        python = shlex.quote(sys.executable)
        replace = " ".join(f"-e s/:{port}/:{free}/" for port, free in self._ports.items())
        (programs / "edgert").write_text(
            f"#!/bin/sh\nif [ -e {settings} ]; then sed -i {replace} {settings}\n"
            f"else export EDGERT_SERVER_HTTP=127.0.0.1:{http} EDGERT_SERVER_GRPC=127.0.0.1:{grpc}; fi\n"
            f'exec {python} -m edge_runtime.cli "$@"\n'
        )
        (programs / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
        cluster = {"EDGERT_CLUSTER_LISTEN": self._listens, "EDGERT_CLUSTER_THREADS": "1"}
        kept |= cluster if self._listens else {}
        return kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(self._folder / "home"),
            "EDGERT_HOME": str(self._store),
            "EDGERT_THREADS": "1",
            "COLUMNS": "100",
            "PYTHONUNBUFFERED": "1",
        }

    def _read(self) -> None:
        assert self._bash.stdout is not None
        for line in self._bash.stdout:
            self._output.put(line)

    def run(self, command: str) -> str:
        """What a command prints, as the page would show it."""
        assert self._bash.stdin is not None
        end = f"end-of-output-{time.monotonic_ns()}"
        for text, real in self._ports.items():
            command = command.replace(f":{text}", f":{real}")
        for text, real in self._addresses.items():
            command = command.replace(text, real)
        # Without input: a command that reads some would take the next one.
        script = f"{{ {command}\n}} </dev/null\nprintf '\\n%s\\n' {end}\n"
        self._bash.stdin.write(script.encode())
        self._bash.stdin.flush()
        lines: list[str] = []
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                line = self._output.get(timeout=max(0.01, deadline - time.monotonic())).decode()
            except Empty:
                raise TimeoutError(f"{command!r} still runs after {SECONDS} s; so far: {lines}") from None
            if line.strip() == end:
                return self._as_shown("".join(lines).removesuffix("\n").rstrip("\n"))
            lines.append(line)

    def serve(self, command: str, expected: list[str]) -> str:
        """Start a daemon; what it has printed once that is what the page shows, or when time is over."""
        output = self._folder / f"serve-{len(self._daemons)}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=self._environment,
            )
        self._daemons.append((process, output))
        deadline = time.monotonic() + SECONDS
        while True:
            found = self._as_shown(output.read_text().rstrip("\n"))
            ended = process.poll() is not None or time.monotonic() > deadline
            if ended or matches(expected, found):
                return found
            time.sleep(0.05)

    def write(self, name: str, text: str) -> None:
        """Make a file."""
        for port, real in self._ports.items():
            text = text.replace(f":{port}", f":{real}")
        (self.work / name).write_text(text)

    def runs_without(self, command: str) -> str:
        """A package that a command's Python file imports and that is not installed; empty if all are."""
        for name in re.findall(r"\bpython (\w+\.py)", command):
            roots = re.findall(r"^(?:from|import) (\w+)", (self.work / name).read_text(), re.MULTILINE)
            for root in roots:
                if importlib.util.find_spec(root) is None:
                    return str(root)
        return ""

    def _as_shown(self, text: str) -> str:
        for port, real in self._ports.items():
            text = text.replace(f":{real}", f":{port}")
        for shown, real in self._addresses.items():
            text = text.replace(real, shown)
        return text.replace(str(self._folder / "home"), TEXT_HOME)

    def close(self) -> None:
        """End everything."""
        for process in (self._bash, *(process for process, _ in self._daemons)):
            process.kill()
            process.wait()
        self._reader.join()
        for pipe in (self._bash.stdin, self._bash.stdout):
            if pipe is not None:
                pipe.close()

    def still_serving(self) -> list[str]:
        """What daemons printed that nobody stopped."""
        return [output.read_text() for process, output in self._daemons if process.poll() is None]


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens at; held together, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Devices:
    """The devices of a page, each made when it is first named."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ports = free_ports(len(ADDRESSES))
        self._addresses = {
            text: f"127.0.0.1:{port}" for text, port in zip(ADDRESSES.values(), ports, strict=True)
        }
        self._sessions: dict[str, Session] = {}
        self._given: dict[str, Path] = {}
        self._invitation = ""

    def give(self, files: dict[str, Path]) -> None:
        """Copies of these for every device's working folder."""
        self._given = files

    def __getitem__(self, name: str) -> Session:
        if name not in self._sessions:
            made = Session(self._folder / (name or "device"), self._addresses, name)
            self._sessions[name] = made
            for given, path in self._given.items():
                shutil.copyfile(path, made.work / given)
        return self._sessions[name]

    def do(self, step: Step) -> str:
        """What a command printed."""
        device = self[step.device]
        command = re.sub(r"\bedgert1\.[\w-]*…", self._invitation, step.command)
        if re.search(r"(^| )edgert serve\b", command):
            return device.serve(command, step.expected)
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            found = device.run(command)
            again = command.startswith(LOOKS) and time.monotonic() < deadline
            if not again or matches(step.expected, found):
                break
            time.sleep(0.2)
        if invitation := re.search(r"\bedgert1\.[\w-]{200,}", found):
            self._invitation = invitation[0]
        return found

    def still_serving(self) -> list[str]:
        """What daemons printed that nobody stopped."""
        return [output for session in self._sessions.values() for output in session.still_serving()]

    def close(self) -> None:
        """End everything."""
        for session in self._sessions.values():
            session.close()


@pytest.fixture
def devices(tmp_path: Path, demo_model: Path) -> Iterator[Devices]:
    for program in ("bash", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"the tutorials use {program}, which is not installed")
    found = Devices(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("name", ["tutorial.md", "daemon.md", "cluster.md", "edits.md"])
def test_the_tutorial_is_true(name: str, devices: Devices) -> None:
    page = REPOSITORY / "docs" / name
    models = REPOSITORY / "models" / "demo"
    devices.give({given: models / path for given, path in GIVEN.get(name, {}).items()})
    done = 0
    for step in steps(page.read_text()):
        device = devices[step.device]
        if step.file:
            device.write(step.file, step.command)
            continue
        if device.runs_without(step.command):
            continue
        found = devices.do(step)
        wanted = "\n".join(step.expected)
        assert matches(step.expected, found), (
            f"{page}, line {step.line}: $ {step.command}\n--- expected\n{normal(wanted)}\n"
            f"--- found\n{normal(found)}\n---"
        )
        done += 1
    assert done >= 5, "there are hardly any commands; is the fence still ```console?"
    assert devices.still_serving() == []


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        (["a", "b"], "a\nb", True),
        (["a"], "a\nb", False),
        (["a", "…"], "a\nb\nc", True),
        (["…", "c"], "a\nb\nc", True),
        (["…", "b"], "a\nb\nc", False),
        (["{…}"], "{anything}", True),
        (["{…}"], "{any\nthing}", False),
        ([], "", True),
        ([], "error", False),
        (["a.c"], "abc", False),
        (["process 12 ends"], "process 7 ends", True),
        (["NAME  SCOPES"], "NAME    SCOPES", True),
        (["NAME  SCOPES"], "NAMESCOPES", False),
    ],
)
def test_how_output_is_compared(expected: list[str], found: str, same: bool) -> None:
    assert matches(expected, found) is same


def test_how_a_page_is_read() -> None:
    page = "x\n```console\nshelf$ b\n```\n"
    page += "```console\n$ a \\\n  b\nout\n$ c\n```\n```\n$ not this\n```\n```python\n# f.py\nx = 1\n```\n"
    found = list(steps(page))
    assert [(step.line, step.device, step.command, step.expected, step.file) for step in found] == [
        (3, "shelf", "b", [], ""),
        (6, "", "a \\\n  b", ["out"], ""),
        (9, "", "c", [], ""),
        (14, "", "# f.py\nx = 1\n", [], "f.py"),
    ]
