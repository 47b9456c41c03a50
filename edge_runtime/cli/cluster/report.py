"""The cluster as the running daemon tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.remote import fetch_status, needed_daemon
from edge_runtime.errors import RequestError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.daemon.runtime_file import RunningDaemon

Report = Mapping[str, Any]
"""A report as ``/api/status`` has it: see :mod:`edge_runtime.cluster.report`."""


def needed_status() -> tuple[RunningDaemon, Report]:
    """The running daemon, and its status with ``cluster`` in it.

    Raises:
        UnavailableError: no daemon runs, or it takes no part in the cluster.
        RequestError: this device belongs to no cluster.
    """
    running = needed_daemon()
    status = fetch_status(running)
    if status.get("cluster") is None:
        raise _no_cluster(running)
    return running, status


def model_of(cluster: Report, name: str) -> Report:
    """A model that is spread, or could be; without a name the one there is.

    Raises:
        RequestError: there is none of that name, or several to choose from.
    """
    models: list[Report] = list(cluster["models"])
    names = ", ".join(model["model"] for model in models)
    if not models:
        raise RequestError(
            "no model of this daemon is set up for the cluster; the first request for one does that, such as "
            "`edgert run --model NAME`, and `edgert logs` says why it failed"
        )
    if not name and len(models) > 1:
        raise RequestError(f"several models are in memory: {names}; name one")
    for model in models:
        if name in ("", model["model"]):
            return model
    raise RequestError(f"{name!r} is not in this daemon's memory; {names} is; `edgert run --model` loads one")


def _no_cluster(running: RunningDaemon) -> Exception:
    from edge_runtime.cluster.identity import read_identity
    from edge_runtime.model_store.paths import home

    identity = read_identity(home())
    if identity is None:
        return RequestError(
            "this device is in no cluster; `edgert cluster invite` founds one, and `edgert cluster join "
            "INVITATION` joins that of another device"
        )
    return UnavailableError(
        f"this device is {identity.name} in a cluster, but the running daemon (process {running.pid}) takes "
        f"no part; `kill -HUP {running.pid}` lets it try again, and `edgert logs` says what is wrong"
    )
