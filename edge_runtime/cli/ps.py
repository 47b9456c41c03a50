"""``edgert ps``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import context_text, count_text, size_text, table
from edge_runtime.cli.remote import fetch_status, needed_daemon
from edge_runtime.cli.terminal import printable

if TYPE_CHECKING:
    from edge_runtime.daemon.runtime_file import RunningDaemon

_STATES = {"queued": "waits", "prefill": "reads", "decode": "writes"}
_CLEAR = "\x1b[H\x1b[2J"  # cursor home, screen empty
_SPEED_SECONDS = 10  # over which the speed is averaged


@click.command("ps")
@click.option("-w", "--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@json_option
def command(watch: bool, as_json: bool) -> None:
    """Show what the daemon is doing.

    Its models, its memory, and the requests that wait or run, without their texts. With --watch --json: one
    object a line.
    """
    while True:
        running = needed_daemon()
        status = fetch_status(running)
        if as_json:
            where = {"http": running.http, "grpc": running.grpc, "tls": running.tls}
            click.echo(json.dumps({**where, **status}, ensure_ascii=False))
        else:
            if watch and sys.stdout.isatty():
                click.echo(_CLEAR, nl=False)
            show(running, status)
        if not watch:
            return
        sys.stdout.flush()
        time.sleep(1)


def show(running: RunningDaemon, status: Mapping[str, Any]) -> None:
    """The status as people read it, on standard output."""
    for line in (_daemon_line(running, status), _device_line(status)):
        click.echo(printable(line, sys.stdout))
    click.echo()
    models = table(
        "MODEL",
        "PARAMETERS",
        "WEIGHTS",
        "CONTEXT",
        "AT ONCE",
        "THREADS",
        "MEMORY",
        right=frozenset({4, 5, 6}),
    )
    for model in status["models"]:
        models.add_row(
            model["name"] + (" (default)" if model["name"] == status["default_model"] else ""),
            count_text(model["parameters"]),
            model["quantization"],
            context_text(model["context"]),
            str(model["sequences"]),
            str(model["threads"]),
            size_text(model["weight_bytes"] + model["kv_bytes"]),
        )
    if status["models"]:
        models.print()
    else:
        click.echo(f"no model in memory; {status['default_model']} is loaded with the first request")
    click.echo()
    _show_requests(status)


def _show_requests(status: Mapping[str, Any]) -> None:
    if not status["requests"]:
        click.echo("no requests")
        return
    requests = table(
        "REQUEST", "CLIENT", "MODEL", "STATE", "PROMPT", "GENERATED", "AGE", right=frozenset({4, 5, 6})
    )
    for one in status["requests"]:
        requests.add_row(
            one["id"] or "-",
            one["client"] or "-",
            one["model"],
            _STATES.get(one["state"], one["state"]),
            str(one["prompt_tokens"]),
            str(one["generated_tokens"]),
            duration_text(one["seconds"]),
        )
    requests.print()


def _daemon_line(running: RunningDaemon, status: Mapping[str, Any]) -> str:
    if status["stopping"]:
        state = "stopping"
    else:
        state = "ready" if status["ready"] else f"not ready: {status['reason']}"
    parts = [
        f"edgert {status['version']}",
        f"process {status['pid']}",
        f"up {duration_text(time.time() - status['started'])}",
        state,
        running.url or f"gRPC {running.grpc}",
    ]
    return " · ".join(parts)


def _device_line(status: Mapping[str, Any]) -> str:
    recent = list(status["speed"])[-_SPEED_SECONDS:]
    parts = [
        f"{sum(recent) / max(len(recent), 1):.0f} tokens/s",
        f"{size_text(status['memory_bytes'])} of memory, {size_text(status['memory_available_bytes'])} free",
    ]
    if status.get("temperature") is not None:
        parts.append(f"{status['temperature']:.0f} °C")
    ended = sum(status["finished"].values())
    parts.append(f"{ended} requests ended" if ended != 1 else "1 request ended")
    return " · ".join(parts)


def duration_text(seconds: float) -> str:
    """A span of time in its two largest units: 4.2 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    for size, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"
