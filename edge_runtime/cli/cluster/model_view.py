"""Who computes what of a model, and where its time goes, for people."""

from __future__ import annotations

from edge_runtime.cli.cluster.report import Report
from edge_runtime.cli.cluster.wording import (
    COLOURS,
    bar,
    count,
    listed,
    milliseconds,
    percent,
    plain,
    stacked,
    times,
)
from edge_runtime.cli.present import size_text, table

_BAR = 24  # characters
_TIMES = ("green", "yellow", "blue")  # of computing, waiting, transfer
_MARKS = "█▒░"


def model_lines(model: Report) -> list[str]:
    """A model's part of ``edgert cluster status``."""
    lines = [headline(model), *_shares(model), f"  {plain(model['reason'])}", ""]
    facts = table("", "", header=False)
    facts.add_row("a token takes", _token_times(model))
    facts.add_row("it waits", waits_text(model))
    if len(used_nodes(model)) > 1 or model["on_time"] or model["recomputed"]:
        facts.add_row("contributions", _contributions(model))
        workers = [node for node in model["nodes"][1:] if node["sent"]]
        for node in workers:
            place = f" {plain(node['name'])}" if len(workers) > 1 else ""
            facts.add_row(f"{_unit(model)}{place}", _traffic(node))
    return lines + [f"  {line}" for line in facts.lines()]


def headline(model: Report, *, with_mode: bool = True) -> str:
    """Name, plan, the plan's mode, transport."""
    parts = [plain(model["model"]), f"plan {model['plan']}"]
    if with_mode:
        parts.append("exact" if model["mode"] == "exact" else f"relaxed, quality {model['quality']:g}")
    if len(used_nodes(model)) > 1:
        parts.append("over datagrams" if model["transport"] == "udp" else "over gRPC streams")
    return " · ".join(parts)


def used_nodes(model: Report) -> list[Report]:
    """Those that compute something."""
    return [node for node in model["nodes"] if node["groups"] or node["head_slices"]]


def waits_text(model: Report) -> str:
    """How often a token waits for others, and where."""
    trips, layers = model["round_trips"], model["layers"]
    if not trips:
        return "never: one device computes everything"
    remote = [any(layer["groups"][1:]) for layer in layers]
    found, start = [], 0
    for sync in model["syncs"]:
        if any(remote[start:sync]):
            found.append(str(sync))
        start = sync
    places = []
    if len(found) == len(layers):
        places.append("after every layer")
    elif found:
        places.append(
            f"after {'layer' if len(found) == 1 else 'the layers'} {listed(found)} of {len(layers)}"
        )
    places += ["for the head"] if trips > len(found) else []
    return ", ".join([times(trips), *places])


def layer_lines(model: Report) -> list[str]:
    """Where each layer's time goes, with a bar in proportion to the slowest layer."""
    names = [plain(node["name"]) for node in model["nodes"]]
    titles = ("LAYER", *names, "COMPUTE", "WAIT", "TRANSFER", "")
    rows = table(*titles, right=frozenset(range(len(titles) - 1)))
    bars = []
    parts = [_parts(layer) for layer in model["layers"]]
    longest = max((sum(times) for times in parts), default=0.0) or 1.0
    for number, (layer, seconds) in enumerate(zip(model["layers"], parts, strict=True), start=1):
        groups = [str(groups) for groups in layer["groups"]]
        rows.add_row(str(number), *groups, *map(milliseconds, seconds), "")
        bars.append(stacked([part / longest for part in seconds], _BAR, _TIMES, _MARKS))
    head, *body = rows.lines()
    drawn = [f"{line}  {one}".rstrip() for line, one in zip(body, bars, strict=True)]
    legend = " ".join(
        f"{stacked([1.0], 1, (colour,), mark)} {word}"
        for colour, mark, word in zip(
            _TIMES, _MARKS, ("compute", "wait", "transfer (beside the other two)"), strict=True
        )
    )
    return ["", f"  {head}", *(f"  {line}" for line in drawn), f"  {legend}"]


def _parts(layer: Report) -> list[float]:
    return [layer["compute_seconds"], layer["wait_seconds"], layer["transfer_seconds"]]


def _shares(model: Report) -> list[str]:
    rows = []
    for place, node in enumerate(model["nodes"]):
        if node not in used_nodes(model):
            continue
        slices = f" + {node['head_slices']} of the head" if node["head_slices"] else ""
        drawn = bar(node["share"], _BAR, COLOURS[place % len(COLOURS)])
        cells = (plain(node["name"]), f"{node['groups']} groups{slices}", size_text(node["nbytes"]))
        rows.append((cells, drawn, percent(node["share"])))
    widths = [max(len(cells[column]) for cells, _, _ in rows) for column in range(3)]
    return [
        f"  {name:{widths[0]}}  {drawn}  {share:>5}  {groups:{widths[1]}}  {size:>{widths[2]}}"
        for (name, groups, size), drawn, share in rows
    ]


def _token_times(model: Report) -> str:
    measured = f"{milliseconds(model['measured_seconds'])}" if model["tokens"] else "not measured yet"
    alone = model["alone_seconds"]
    parts = [
        f"{measured} ({milliseconds(model['predicted_seconds'])} predicted)",
        "alone it does not fit this device" if alone is None else f"{milliseconds(alone)} predicted alone",
    ]
    return ", ".join(parts[: 1 if len(used_nodes(model)) == 1 else 2])


def _contributions(model: Report) -> str:
    late = sum(model["late"])
    layers = [f"{count(number)} by {by}" for by, number in enumerate(model["late"], start=1) if number >= 0.5]
    parts = [
        f"{count(model['on_time'])} on time",
        f"{count(late)} late" + (f" ({', '.join(layers)})" if layers else ""),
        f"{count(model['lost'])} lost",
        f"{count(model['recomputed'])} recomputed here",
    ]
    return ", ".join(parts)


def _unit(model: Report) -> str:
    return "datagrams" if model["transport"] == "udp" else "messages"


def _traffic(node: Report) -> str:
    parts = [
        f"{count(node['sent'])} sent",
        f"{count(node['received'])} received",
        f"{count(node['repeats'])} asked again",
    ]
    parts += [f"{count(node[name])} {name}" for name in ("bad", "forged") if node[name]]
    return ", ".join(parts)
