"""``edgert doctor``: what is wrong with this device, and what to do."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.terminal import Bar

if TYPE_CHECKING:
    from edge_runtime.cli.doctor.finding import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "fault": ("FAULT", "red")}


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check this device and say what to do about each fault.

    Exit code 1 if there is a fault; notes do not count.
    """
    from edge_runtime.cli.doctor.machine import machine
    from edge_runtime.cli.doctor.software import software

    with Bar("looking", total=None):
        findings = [*machine(), *software()]
    faults = sum(finding.level == "fault" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": not faults, "findings": [asdict(finding) for finding in findings]}))
    else:
        _show(findings)
        notes = sum(finding.level == "note" for finding in findings)
        click.echo(f"\n{_count(faults, 'fault')}, {_count(notes, 'note')}")
    return 1 if faults else 0


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _show(findings: list[Finding]) -> None:
    indent = max(len(finding.subject) for finding in findings) + 9
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
    for finding in findings:
        mark, colour = _MARKS[finding.level]
        found = f"\n{' ' * indent}".join(textwrap.wrap(finding.found, width - indent))
        click.echo(f"{click.style(f'{mark:5}', fg=colour)}  {finding.subject:{indent - 9}}  {found}")
        if finding.advice:
            advice = textwrap.wrap(
                finding.advice, width - indent - 2, break_long_words=False, break_on_hyphens=False
            )
            for number, line in enumerate(advice):
                click.secho(f"{' ' * indent}{'→ ' if number == 0 else '  '}{line}", bold=True)
