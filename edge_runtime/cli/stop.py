"""``edgert stop``."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.remote import needed_daemon
from edge_runtime.errors import DeadlineError, ForbiddenError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.daemon.runtime_file import RunningDaemon

_KILL_SECONDS = 10.0  # the kernel ends a killed process within this, unless a disk hangs


@click.command("stop")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for running requests.",
)
@click.option("--kill", is_flag=True, help="End it at once when that time is over.")
def command(timeout: float, kill: bool) -> None:
    """Let the daemon finish and end.

    It takes nothing new, completes running requests within its own limit (server.shutdown_seconds), and ends.
    """
    running = needed_daemon()
    if not running.same_machine:
        raise UnavailableError(
            f"the daemon (process {running.pid}) runs in another container; stop that container instead"
        )
    process = Process(running.pid)
    still = needed_daemon()  # whether the process just opened is the daemon, and not one with its number
    if still.pid != running.pid:
        raise UnavailableError("the daemon has just been replaced by another one; try again")
    process.send(signal.SIGTERM, running)
    if process.ended_within(timeout):
        click.echo(f"stopped (process {running.pid})", err=True)
        return
    if not kill:
        raise DeadlineError(
            f"the daemon (process {running.pid}) still finishes requests after {timeout:g} s; it ends when "
            "they have, `edgert stop --kill` ends it sooner"
        )
    process.send(signal.SIGKILL, running)
    if not process.ended_within(_KILL_SECONDS):
        raise DeadlineError(f"process {running.pid} does not end; it may wait for a disk")
    click.echo(f"killed (process {running.pid})", err=True)


class Process:
    """Another process, held so that its number cannot come to mean a new one.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open"):
            try:
                self._descriptor = os.pidfd_open(pid)
            except OSError:  # it has ended, or the kernel is older than 5.3
                self._descriptor = None

    def send(self, number: signal.Signals, running: RunningDaemon) -> None:
        """Signal it; without effect if it has ended.

        Raises:
            ForbiddenError: it is another user's.
        """
        try:
            if self._descriptor is not None and hasattr(signal, "pidfd_send_signal"):
                signal.pidfd_send_signal(self._descriptor, number)
            else:
                os.kill(self._pid, number)
        except ProcessLookupError:
            return
        except PermissionError as error:
            how = f"`sudo systemctl stop {running.unit}`" if running.unit else "`sudo` before this command"
            raise ForbiddenError(f"process {self._pid} belongs to another user; {how} stops it") from error

    def ended_within(self, seconds: float) -> bool:
        """Wait for its end."""
        if self._descriptor is not None:
            return bool(select.select([self._descriptor], [], [], seconds)[0])
        from edge_runtime.daemon.runtime_file import process_lives

        end = time.monotonic() + seconds
        while process_lives(self._pid):
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        return True
