"""Writes docs/reference.md from the commands themselves: ``python docs/write_reference.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from edge_runtime.cli.program import group

PAGE = Path(__file__).with_name("reference.md")

_HEAD = """\
# Command reference

Written by `make reference` from the commands themselves; a test compares the two.

Every command takes `-h` or `--help`. Answers go to standard output, everything else to standard error.
With `--json`, standard output is exactly one JSON object, also for errors:
`{"error": {"code": "...", "message": "...", "exit_code": N}}`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a fault that `edgert doctor` found, or one of the system or the program |
| 2 | a wrong command line, a parameter out of range, a prompt longer than the context |
| 3 | a file of a model or an adapter that is damaged, or one that the engine cannot run |
| 4 | no such model, edit or adapter |
| 5 | a download that failed |
| 6 | too little memory |
| 7 | a library is missing or wrong |
| 8 | the daemon has too much to do; try again |
| 9 | the time given to a request is over |
| 10 | no daemon, or one that is stopping |
| 11 | a token is missing, wrong, or does not allow this |
| 12 | an edit that failed its own checks: it is kept, and changes nothing |
| 130 | interrupted with Ctrl-C |

| variable | meaning |
|---|---|
| `EDGERT_HOME` | folder of models, settings, tokens and state, instead of the user's data folder |
| `EDGERT_MODEL` | the model where `--model` is not given |
| `EDGERT_THREADS` | CPU threads where `--threads` is not given |
| `EDGERT_SECTION_KEY` | a setting of the daemon, as `EDGERT_SERVER_HTTP`: [all of them](api.md#settings) |
| `EDGERT_HUB` | another hub for `hf:` sources; https, or http on this machine |
| `EDGERT_OFFLINE` | `1`: `models pull` fetches nothing |
| `HF_TOKEN` | sent to the hub, and to nobody else, for models that need an account |
| `EDGERT_DEBUG` | `1`: errors come with a Python traceback |

Tab completion: `eval "$(edgert completion bash)"` (or `zsh`; for fish see `edgert completion --help`).
"""


def commands(
    command: click.Command, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below and with this one, in the order of the help."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from commands(child, (*path, name))


def _value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return " " + "|".join(map(str, option.type.choices))
    return f" {option.metavar or option.type.name.upper().replace(' RANGE', '')}"


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}{_value(option) if name.startswith('--') else ''}`" for name in option.opts)
    help_text = (option.help or "").replace("  [default: ", " [default: ").replace("|", "\\|")
    if option.show_default and not option.is_flag:
        help_text += f" [default: {option.default}]"
    return f"| {names.replace('|', chr(92) + '|')} | {help_text.strip()} |"


def _section(path: tuple[str, ...], command: click.Command) -> str:
    arguments = [
        f"{'' if parameter.required else '['}{parameter.metavar or (parameter.name or '').upper()}"
        f"{'' if parameter.required else ']'}"
        for parameter in command.params
        if isinstance(parameter, click.Argument)
    ]
    lines = [f"## {' '.join(path)}", "", "```", " ".join([*path, "[OPTIONS]", *arguments]), "```", ""]
    lines += [inspect.cleandoc(command.help or ""), ""]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    options = [option for option in options if "--version" not in option.opts]
    if options:
        lines += ["| option | meaning |", "|---|---|", *map(_row, options), ""]
    return "\n".join(lines)


def reference() -> str:
    """The page."""
    sections = [
        _section(path, command)
        for path, command in commands(group, ("edgert",))
        if not isinstance(command, click.Group)
    ]
    return "\n".join([_HEAD, *sections])


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
