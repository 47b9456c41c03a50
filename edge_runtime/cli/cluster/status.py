"""``edgert cluster status``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from edge_runtime.cli.cluster.members_view import member_lines
from edge_runtime.cli.cluster.model_view import layer_lines, model_lines
from edge_runtime.cli.cluster.report import Report, needed_status
from edge_runtime.cli.options import json_option

_PAUSE = 1.0


@click.command("status")
@click.option("-w", "--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option("--layers", is_flag=True, help="Show where the time of each layer goes as well.")
@json_option
def command(watch: bool, layers: bool, as_json: bool) -> None:
    """Show the members and who computes what.

    Of each model in memory: what each device computes, how long a token takes and how often it waits, and
    what became of the other devices' contributions. With --watch --json: one object a line.
    """
    if watch and not as_json and sys.stdout.isatty():
        _watch(layers)
        return
    while True:
        _, status = needed_status()
        if as_json:
            click.echo(json.dumps(status["cluster"], ensure_ascii=False))
        else:
            click.echo("\n".join(_lines(status["cluster"], layers=layers)))
        if not watch:
            return
        sys.stdout.flush()
        time.sleep(_PAUSE)


def _watch(layers: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def drawn() -> Text:
        _, status = needed_status()
        return Text.from_ansi("\n".join(_lines(status["cluster"], layers=layers)))

    with Live(drawn(), console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            time.sleep(_PAUSE)
            live.update(drawn(), refresh=True)


def _lines(cluster: Report, *, layers: bool) -> list[str]:
    lines = member_lines(cluster)
    models: list[dict[str, Any]] = list(cluster["models"])
    for model in models:
        lines += ["", *model_lines(model)]
        if layers:
            lines += layer_lines(model)
    if not models:
        lines += ["", "No model is in memory; the first request loads one."]
    return lines
