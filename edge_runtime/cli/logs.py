"""``edgert logs``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO

import click

from edge_runtime.cli.remote import running_daemon
from edge_runtime.cli.terminal import printable
from edge_runtime.errors import DependencyError, UnavailableError

_POLL_SECONDS = 0.2


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    metavar="N",
    help="The last N lines.",
)
def command(follow: bool, lines: int) -> int:
    """Show the daemon's log.

    It is in the file that log.file names, or in the system's journal. Prompts and answers are not in it.
    """
    running = running_daemon()
    if running is None:
        file, unit, journal, pid = _configured_file(), "", False, 0
    else:
        file, unit, journal, pid = running.log, running.unit, running.journal, running.pid
    if file:
        _show_file(Path(file), lines, follow)
        return 0
    if journal:
        return _show_journal([f"--unit={unit}"] if unit else [f"_PID={pid}"], lines, follow)
    if running is None:
        raise UnavailableError("no daemon runs, and the settings name no log file (log.file)")
    raise UnavailableError(
        f"the daemon (process {pid}) writes to its standard error, where it was started; `edgert serve "
        "--log-file FILE`, or log.file in the settings, keeps a file"
    )


def _configured_file() -> str:
    from edge_runtime.daemon.config_file import load_config

    return load_config(None, os.environ, {}).log.file


def _show_journal(selection: list[str], lines: int, follow: bool) -> int:
    if shutil.which("journalctl") is None:
        raise DependencyError("the log is in systemd's journal, but there is no journalctl here to read it")
    words = ["journalctl", *selection, f"--lines={lines}", "--no-pager", "--quiet"]
    return subprocess.run([*words, "--follow"] if follow else words, check=False).returncode


def _show_file(path: Path, lines: int, follow: bool) -> None:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}; this is where the daemon's log goes") from error
    with file:
        for line in _last_lines(path, file, lines):
            _write(line)
        if follow:
            sys.stdout.flush()
            _follow(path, file)


def _last_lines(path: Path, file: BinaryIO, count: int) -> list[bytes]:
    """The last lines; of the rotated file before it as well, where this one has too few."""
    kept: deque[bytes] = deque(file, maxlen=count)
    if len(kept) == count:
        return list(kept)
    try:
        with path.with_name(f"{path.name}.1").open("rb") as before:
            older: deque[bytes] = deque(before, maxlen=count - len(kept))
    except OSError:
        return list(kept)
    return [*older, *kept]


def _follow(path: Path, file: BinaryIO) -> None:
    """Write what is appended, through every rotation."""
    rest = b""
    while True:
        more = file.read(1 << 16)
        if more:
            *whole, rest = (rest + more).split(b"\n")
            for line in whole:
                _write(line + b"\n")
            sys.stdout.flush()
            continue
        if _replaced(path, file):
            rest = b""
            new = path.open("rb")
            file.close()
            file = new
            continue
        time.sleep(_POLL_SECONDS)


def _replaced(path: Path, file: BinaryIO) -> bool:
    try:
        now, then = path.stat(), os.fstat(file.fileno())
    except OSError:  # between the old file's new name and the new file
        return False
    return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


def _write(line: bytes) -> None:
    sys.stdout.write(printable(line.decode(errors="replace"), sys.stdout))
