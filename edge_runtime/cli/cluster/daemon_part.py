"""Whether the running daemon takes part in the cluster that this device belongs to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.reload import reload_daemon
from edge_runtime.cli.remote import fetch_status
from edge_runtime.errors import EdgeRuntimeError

if TYPE_CHECKING:
    from edge_runtime.daemon.runtime_file import RunningDaemon

_SECONDS = 15.0  # a daemon answers SIGHUP within a token, but a small board may be busy
_PAUSE = 0.1


def have_daemon_look(home: Path, name: str | None) -> tuple[bool, str]:
    """Have the running daemon read the cluster's files anew, and wait until it does what they say.

    Args:
        home: folder of its state.
        name: of this device in its cluster; None where it belongs to none any more.

    Returns:
        Whether a daemon does so now, and a sentence for people.
    """
    from edge_runtime.daemon import runtime_file

    running = runtime_file.read(home)
    if running is None:
        if name is None:
            return True, ""
        if runtime_file.is_starting(home):
            return False, "the daemon here is starting; it takes part as soon as it is ready"
        return False, "no daemon runs here; `edgert serve` starts one, and only a running one takes part"
    if _name_in_cluster(running) == (name,):
        return True, ""
    told, notice = reload_daemon(home)
    if not told:
        return False, notice
    end = time.monotonic() + _SECONDS
    while (seen := _name_in_cluster(running)) != (name,):
        if seen == ():
            return True, notice  # it tells this user nothing; it was told all the same
        if time.monotonic() > end:
            what = "take part" if name is not None else "let the cluster go"
            return (
                False,
                f"the running daemon (process {running.pid}) does not {what}; `edgert logs` says why",
            )
        time.sleep(_PAUSE)
    if name is None:
        return True, f"the running daemon (process {running.pid}) works alone now"
    return True, f"the running daemon (process {running.pid}) takes part now"


def _name_in_cluster(running: RunningDaemon) -> tuple[str | None] | tuple[()]:
    """The device's name as the daemon has it, None for no cluster; nothing where it does not say."""
    try:
        status: dict[str, Any] = fetch_status(running)
    except EdgeRuntimeError:
        return ()
    cluster = status.get("cluster")
    return (None,) if cluster is None else (cluster["name"],)
