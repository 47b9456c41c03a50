"""What `edgert cluster status` writes of a model, from reports as the daemon gives them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
import pytest
from page_daemon import partition

from edge_runtime.cli.cluster.model_view import layer_lines, model_lines, waits_text
from edge_runtime.cluster.report import LayerReport, NodeShare


def report(**changes: Any) -> dict[str, Any]:
    """A model on desk and shelf; phone computes nothing."""
    return asdict(partition(**changes))


def shown(lines: list[str]) -> str:
    """Without colours, as a pipe gets it."""
    return click.unstyle("\n".join(lines))


@pytest.mark.parametrize(
    ("trips", "syncs", "text"),
    [
        (0, (), "never: one device computes everything"),
        (1, (6,), "once, after layer 6 of 6"),
        (2, (1, 6), "twice, after the layers 1 and 6 of 6"),
        (3, (1, 6), "3 times, after the layers 1 and 6 of 6, for the head"),
        (6, (1, 2, 3, 4, 5, 6), "6 times, after every layer"),
        (7, (1, 2, 3, 4, 5, 6), "7 times, after every layer, for the head"),
    ],
)
def test_it_says_where_a_token_waits(trips: int, syncs: tuple[int, ...], text: str) -> None:
    assert waits_text(report(round_trips=trips, syncs=syncs)) == text


def test_only_layers_with_something_elsewhere_are_waited_for() -> None:
    layers = tuple(LayerReport(0.0, 0.0, 0.0, (24, 0) if place < 3 else (4, 20)) for place in range(6))
    assert waits_text(report(round_trips=1, syncs=(2, 6), layers=layers)) == "once, after layer 6 of 6"


def test_contributions_say_what_became_of_them() -> None:
    (line,) = [line for line in model_lines(report()) if "on time" in line]
    assert line.split("  ")[-1] == "812 on time, 36 late (31 by 1, 4 by 2), 2 lost, 1 recomputed here"


def test_with_several_workers_each_has_its_own_datagrams() -> None:
    lines = shown(model_lines(report()))
    assert "  datagrams      900 sent, 870 received, 31 asked again" in lines
    shelf = NodeShare("shelf", 54, 0.375, 0, 1, 1.0, sent=5, received=5)
    phone = NodeShare("phone", 10, 0.1, 0, 1, 1.0, sent=1200, received=9, repeats=7, forged=2)
    lines = shown(model_lines(report(nodes=(NodeShare("desk", 90, 0.6, 3, 1), shelf, phone))))
    assert "  datagrams shelf  5 sent, 5 received, 0 asked again\n" in lines
    assert "  datagrams phone  1,200 sent, 9 received, 7 asked again, 2 forged" in lines


def test_names_and_reasons_cannot_command_the_terminal() -> None:
    hostile = "a\x1b[2Jb\u202e"
    nodes = (NodeShare(hostile, 144, 1.0, 3, 1),)
    found = report(model=hostile, reason=hostile, nodes=nodes, layers=(LayerReport(1.0, 1.0, 1.0, (24,)),))
    text = "\n".join(model_lines(found) + layer_lines(found))
    assert "a[2Jb" in text
    assert "\u202e" not in text
    assert "\x1b[2J" not in text
