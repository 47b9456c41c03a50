"""What goes to a person's terminal: progress bars, and text that cannot command the terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_APPEARS_AFTER = 0.6  # seconds: what is done sooner needs no bar, and rich need not be imported
_LEAST_SHARE = 0.02  # that must be done before its time says something about the rest
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str, stream: Any) -> str:
    """Text for a stream: without control characters if it is a terminal.

    A model can write any character; an escape sequence could move the cursor or retitle the window.
    """
    return text.translate(_CONTROLS) if stream.isatty() else text


class Bar:
    """A progress bar on standard error for work that lasts.

    There is none where that is no terminal, or one that cannot move its cursor.

    Args:
        title: what is being done.
        counts_bytes: show sizes, speed and time left.
        estimates: show how long it will take, for work that takes minutes and goes on evenly.
        total: of what :meth:`update` counts; None shows movement only.
    """

    def __init__(
        self,
        title: str,
        *,
        counts_bytes: bool = False,
        estimates: bool = False,
        total: float | None = None,
    ) -> None:
        self._title = title
        self._counts_bytes = counts_bytes
        self._estimates = estimates
        self._begun = time.monotonic()
        self._state: tuple[float, float | None] = (0.0, total)
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._closed = False
        self._timer = threading.Timer(_APPEARS_AFTER, self._appear)
        self._timer.daemon = True

    def __enter__(self) -> Bar:
        if sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar; safe to call twice."""
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def update(self, done: float, total: float | None = 1.0) -> None:
        """Show how far it is."""
        with self._lock:
            self._state = (done, total)
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=done, total=total, left=self._left())

    def retitle(self, title: str) -> None:
        """Say what is being done now."""
        with self._lock:
            self._title = title
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, description=title)

    def _left(self) -> str:
        """How long it will take, from how long it took so far; empty where that says nothing yet."""
        done, total = self._state
        spent = time.monotonic() - self._begun
        if not self._estimates or not total or done < _LEAST_SHARE * total:
            return ""
        left = spent * (total - done) / done
        return f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"

    def say(self, text: str) -> None:
        """A line above the bar, or on standard error where there is none."""
        with self._lock:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, style="dim")
            else:
                print(text, file=sys.stderr, flush=True)

    def _appear(self) -> None:
        from rich import progress as bars
        from rich.console import Console

        columns: list[Any] = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn(None)]
        if self._counts_bytes:
            columns += [bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn()]
        else:
            columns += [bars.TaskProgressColumn(), bars.TimeElapsedColumn()]
        if self._estimates:
            columns.append(bars.TextColumn("{task.fields[left]}", markup=False))
        with self._lock:
            if self._closed:
                return
            console = Console(stderr=True)
            self._progress = bars.Progress(*columns, console=console, transient=True, expand=True)
            done, total = self._state
            self._task = self._progress.add_task(self._title, total=total, left=self._left())
            self._progress.update(self._task, completed=done)
            self._progress.start()
