"""Progress bars on a real terminal, and where there is none."""

from __future__ import annotations

import re
import subprocess
import sys

from program import Program, Terminal

WORK = """
import time
from edge_runtime.cli.terminal import Bar
with Bar("working") as bar:
    bar.update(0.25)
    time.sleep({seconds})
    bar.say("a notice")
    bar.update(0.5)
    time.sleep(0.3)
    bar.close()
    bar.close()
print("after")
"""


def command(seconds: float) -> list[str]:
    return [sys.executable, "-c", WORK.format(seconds=seconds)]


def test_bar_shows_how_far_long_work_is_and_then_vanishes(edgert: Program) -> None:
    with Terminal(command(1.5), edgert.environment()) as terminal:
        shown = terminal.rest()
    assert "working" in shown
    assert "25%" in shown
    assert "50%" in shown
    assert "a notice" in shown
    # The line of the bar is erased before what follows.
    assert shown.rpartition("50%")[2].count("\x1b[2K") >= 1
    assert shown.endswith("after\r\n")


def test_short_work_has_no_bar(edgert: Program) -> None:
    with Terminal(command(0.0), edgert.environment()) as terminal:
        assert terminal.rest() == "a notice\r\nafter\r\n"


def test_terminal_that_cannot_move_its_cursor_has_no_bar(edgert: Program) -> None:
    with Terminal(command(1.0), edgert.environment({"TERM": "dumb"})) as terminal:
        assert terminal.rest() == "a notice\r\nafter\r\n"


def test_no_terminal_has_no_bar(edgert: Program) -> None:
    done = subprocess.run(command(1.0), capture_output=True, text=True, env=edgert.environment(), check=True)
    assert done.stdout == "after\n"
    assert done.stderr == "a notice\n"


def test_long_work_says_how_long_it_will_take(edgert: Program) -> None:
    work = WORK.replace('Bar("working")', 'Bar("working", estimates=True)').format(seconds=1.5)
    with Terminal([sys.executable, "-c", work], edgert.environment()) as terminal:
        shown = terminal.rest()
    # Half is done after 1.5 s and the time that importing the bar's parts took.
    assert re.search(r"50%[^\n]*\b[123] s left", shown)
