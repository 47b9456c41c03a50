"""The real program in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the program left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value."""
        return json.loads(self.out)


class Program:
    """Runs ``edgert`` in a process of its own with an empty store."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a run: without the caller's own settings of the program.

        One thread: two of them wait for each other at every step, which takes a hundred times as long where
        other tests want the cores too.
        """
        kept = {k: v for k, v in os.environ.items() if k != "TERM" and not k.startswith(("EDGERT_", "HF_"))}
        own = {"EDGERT_HOME": str(self.home), "EDGERT_THREADS": "1", "COLUMNS": "100"}
        return {**kept, **own, **(extra or {})}

    def command(self, *arguments: str | Path) -> list[str]:
        """What starts it: the same Python as the tests'."""
        return [sys.executable, "-m", "edge_runtime.cli", *map(str, arguments)]

    def __call__(
        self,
        *arguments: str | Path,
        stdin: str | bytes = "",
        environment: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> Outcome:
        done = subprocess.run(
            self.command(*arguments),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            env=self.environment(environment),
            timeout=timeout,
            cwd=REPOSITORY,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """A program whose stdin, stdout and stderr are one terminal, as a person would have it."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._control, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env={"TERM": "xterm", **environment}
        )
        os.close(terminal)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._control)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._control, text.encode())

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until a text is shown: at the prompt, Python may miss one that comes too early."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            try:
                self.until(text, 1)
                return
            except TimeoutError:
                continue
        raise TimeoutError(f"{text!r} did not come")

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown before a text; waits for it.

        Raises:
            TimeoutError: the text does not come.
        """
        end = time.monotonic() + seconds
        while text not in self._unread:
            if not select.select([self._control], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{text!r} did not come, but {self._unread!r}")
            self._unread += os.read(self._control, 65536).decode(errors="replace")
        before, _, self._unread = self._unread.partition(text)
        return before

    def rest(self) -> str:
        """What is shown until the program ends."""
        while True:
            try:
                more = os.read(self._control, 65536)
            except OSError:  # how Linux says that the other side is closed
                more = b""
            if not more:
                self.process.wait(30)
                return self._unread
            self._unread += more.decode(errors="replace")


def wait_until(claim: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something that another process does.

    Raises:
        TimeoutError: it did not happen.
    """
    end = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)
