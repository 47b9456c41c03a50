"""Telling a running daemon to read tokens and certificates again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from edge_runtime.daemon import runtime_file


def reload_daemon(home: Path) -> tuple[bool, str]:
    """Send SIGHUP to the daemon of a home folder, if one runs.

    Returns:
        Whether no daemon is left with old tokens and certificates, and a sentence for people; empty if none
        runs.
    """
    running = runtime_file.read(home)
    if running is None:
        return True, ""
    by_hand = f"sudo systemctl reload {running.unit}" if running.unit else f"kill -HUP {running.pid}"
    if not running.same_machine:
        return False, f"a daemon runs in another container; send SIGHUP to its process {running.pid} there"
    try:
        os.kill(running.pid, signal.SIGHUP)
    except ProcessLookupError:
        return True, ""  # it ended just now
    except PermissionError:
        return False, f"the running daemon belongs to another user; `{by_hand}` makes it read this"
    return True, f"the running daemon (process {running.pid}) reads it now"
