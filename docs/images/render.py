"""Draws docs/images/*.svg from the program's real output: ``make images``.

Each command runs on a terminal of its own, so that it shows what a person would see.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
WIDTH = 100

PICTURES = {
    "demo": [
        "edgert models list",
        "edgert run --seed 1 'Where does Paul Colton live?'",
        "edgert run --seed 1 'In which country does Paul Colton live?'",
        "edgert run --seed 1 --raw --max-tokens 60 'One rainy morning Paul Colton'",
    ],
}


def shown(command: str) -> str:
    """What a command writes to a terminal; on a dumb one there are no bars, which vanish anyway."""
    control, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "dumb", "FORCE_COLOR": "1"}
    with subprocess.Popen(
        shlex.split(command),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        cwd=REPOSITORY,
    ) as process:
        os.close(terminal)
        output = b""
        while True:
            try:
                output += os.read(control, 65536)
            except OSError:
                break
    os.close(control)
    if process.returncode:
        sys.exit(f"{command} failed: {output.decode()}")
    return output.decode().replace(str(REPOSITORY), "~/edge-runtime").replace("\r\n", "\n")


def main() -> None:
    """Write every picture."""
    for name, commands in PICTURES.items():
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
        for number, command in enumerate(commands):
            console.print(Text(("\n" if number else "") + f"$ {command}", style="bold"))
            console.print(Text.from_ansi(shown(command).rstrip("\n")))
        svg = console.export_svg(title="edgert")
        # Without the fonts that rich would fetch from the network: whoever looks at it has one.
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
        (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
