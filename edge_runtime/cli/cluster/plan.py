"""``edgert cluster plan``."""

from __future__ import annotations

import json

import click

from edge_runtime.cli.cluster.model_view import headline, used_nodes, waits_text
from edge_runtime.cli.cluster.report import Report, model_of, needed_status
from edge_runtime.cli.cluster.wording import milliseconds, percent, plain
from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import size_text, table

_TITLES = ("DEVICE", "SHARE", "GROUPS", "HEAD", "MEMORY", "SPEED", "EXCHANGE", "LOSS", "COPIES")


@click.command("plan")
@click.argument("model", required=False, default="")
@json_option
def command(model: str, as_json: bool) -> None:
    """Show why a model is spread as it is.

    MODEL is one in the daemon's memory; it need not be named where there is only one. Devices and the network
    were measured when they joined, and are while they work.
    """
    _, status = needed_status()
    cluster = status["cluster"]
    found = model_of(cluster, model)
    unused = _unused(cluster, found)
    if as_json:
        click.echo(json.dumps({**found, "unused": unused}, ensure_ascii=False))
        return
    click.echo(headline(found))
    click.echo(f"{_sentence(found['reason'])}\n")
    _show_nodes(found)
    click.echo(f"\n{_times(found, cluster)}")
    if len(used_nodes(found)) > 1:
        click.echo(f"A token waits {waits_text(found)}.")
    if unused:
        click.echo("\nNot used:")
        for name, why in unused.items():
            click.echo(f"  {name}: {why}")


def _sentence(text: str) -> str:
    text = plain(text)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _show_nodes(model: Report) -> None:
    rows = table(*_TITLES, right=frozenset(range(1, len(_TITLES))))
    for place, node in enumerate(model["nodes"]):
        link = (
            f"{milliseconds(node['round_trip_seconds'])} ± {milliseconds(node['jitter_seconds'])}",
            percent(node["loss"]),
            str(node["copies"]),
        )
        rows.add_row(
            plain(node["name"]),
            percent(node["share"]),
            str(node["groups"]),
            str(node["head_slices"]),
            size_text(node["nbytes"]),
            f"{size_text(int(node['bytes_per_second']))}/s",
            *(link if place else ("-", "-", "-")),
        )
    rows.print()


def _times(model: Report, cluster: Report) -> str:
    parts = [f"A token should take {milliseconds(model['predicted_seconds'])}"]
    if model["tokens"]:
        parts.append(f"it takes {milliseconds(model['measured_seconds'])}")
    here, alone = plain(cluster["name"]), model["alone_seconds"]
    if alone is None:
        parts.append(f"{here} alone has no room for the model")
    elif len(used_nodes(model)) > 1:
        parts.append(f"{here} alone would take {milliseconds(alone)}")
    return "; ".join(parts) + "."


def _unused(cluster: Report, model: Report) -> dict[str, str]:
    """Members that compute nothing of a model -> why."""
    used = {node["name"] for node in used_nodes(model)}
    measured = {node["name"]: node for node in model["nodes"]}
    found = {}
    for member in cluster["members"]:
        name = member["name"]
        if name in used or member["state"] == "here":
            continue
        if member["state"] == "gone":
            why = (
                f"it cannot be reached: {plain(member['reason'])}"
                if member["reason"]
                else "it cannot be reached"
            )
        elif not member["lent_bytes"]:
            why = "it lends no memory (cluster.lend_memory_mb = 0 in its settings)"
        elif name in measured:
            node = measured[name]
            why = (
                f"an exchange with it takes {milliseconds(node['round_trip_seconds'])} and it multiplies "
                f"{size_text(int(node['bytes_per_second']))}/s; no share of it makes a token faster"
            )
        else:
            why = (
                "it was not there when this plan was made, or could not take a part; `edgert logs` says more"
            )
        found[plain(name)] = why
    return found
