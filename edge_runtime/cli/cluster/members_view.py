"""The members of a cluster, for people."""

from __future__ import annotations

import click

from edge_runtime.cli.cluster.report import Report
from edge_runtime.cli.cluster.wording import STATE_COLOURS, STATES, milliseconds, plain
from edge_runtime.cli.present import size_text, table

_TITLES = ("MEMBER", "STATE", "LENDS", "THREADS", "TEMPERATURE", "BATTERY", "ROUND TRIP", "ADDRESS")


def member_lines(cluster: Report) -> list[str]:
    """A headline, a table, and why members are in a bad state."""
    members = cluster["members"]
    counted = "1 member" if len(members) == 1 else f"{len(members)} members"
    role = "founder of this cluster" if cluster["is_founder"] else "member of a cluster"
    rows = table(*_TITLES, right=frozenset({2, 3, 4, 5, 6}))
    for member in members:
        rows.add_row(*_cells(member))
    lines = [f"{plain(cluster['name'])} · {role} · {counted}", "", *rows.lines()]
    for member in members:
        if member["reason"]:
            colour = STATE_COLOURS.get(member["state"])
            state = click.style(STATES.get(member["state"], "unknown"), fg=colour)
            lines.append(f"  {plain(member['name'])} is {state}: {plain(member['reason'])}")
    if cluster["is_founder"] and any(member["state"] == "gone" for member in members):
        lines.append("  `edgert cluster remove NAME` takes out one that will not come back.")
    if len(members) == 1:
        lines += ["", "Nobody else is here yet; `edgert cluster invite` lets another device join."]
    return lines


def _cells(member: Report) -> tuple[str, ...]:
    known = member["state"] != "gone"
    lends = size_text(member["lent_bytes"]) if member["lent_bytes"] else "nothing"
    return (
        plain(member["name"]),
        STATES.get(member["state"], "unknown"),
        lends if known else "-",
        str(member["threads"]) if known else "-",
        _or_dash(member["temperature"], "{:.0f} °C"),
        _or_dash(member["battery"], "{:.0f} %"),
        "-" if member["round_trip_seconds"] is None else milliseconds(member["round_trip_seconds"]),
        plain(member["address"]) or "-",
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
