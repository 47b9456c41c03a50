"""Edits as people read them: while one is made, when it has ended, and all of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import click

from edge_runtime.cli.present import size_text, table
from edge_runtime.cli.terminal import Bar, printable
from edge_runtime.personalize.edit_report import Edit, EditCheck, EditProgress

REJECTED = 12
"""Exit code for an edit that failed its own checks."""

STATE_COLOURS = {
    "applied": "green",
    "rejected": "yellow",
    "failed": "red",
    "running": "cyan",
    "queued": "cyan",
}

_LONGEST = 60  # characters of a request in a list


class Making(Protocol):
    """An edit as it is being made."""

    @property
    def edit(self) -> Edit | None:
        """As it was last told."""

    def __iter__(self) -> Iterator[EditProgress]: ...
    def close(self) -> None:
        """Watch it no longer."""


# --- while it is made -------------------------------------------------------------------------


def watch(making: Making, target: str, *, goes_on: bool) -> Edit:
    """Show an edit's progress until it has ended.

    Args:
        target: what the model is to say.
        goes_on: whether it is made by the daemon, so that Ctrl-C does not end it.

    Raises:
        EdgeRuntimeError: it could not be made.
    """
    behind: tuple[str, ...] = ()
    with Bar("waiting") as bar:
        try:
            for moment in making:
                if moment.behind and moment.behind != behind:
                    bar.say(f"waiting for {', '.join(moment.behind)}")
                behind = moment.behind
                bar.retitle(_stage_text(moment, target))
                bar.update(moment.step, moment.steps or None)
        except KeyboardInterrupt:
            if goes_on and making.edit is not None:
                name = making.edit.name
                bar.say(f"{name} goes on in the daemon; `edgert edits cancel {name}` ends it")
            raise
        finally:
            making.close()
    assert making.edit is not None, "an edit that has ended is known"
    return making.edit


def _stage_text(moment: EditProgress, target: str) -> str:
    match moment.stage:
        case "waiting":
            return f"waiting for {', '.join(moment.behind)}" if moment.behind else "waiting"
        case "preparing":
            return "finding texts about the subject"
        case "searching":
            return f"step {moment.step}: {printable(target, sys.stderr)!r} has {moment.probability:.0%}"
        case "solving":
            return "solving with all standing edits"
    return "testing"


# --- when it has ended ------------------------------------------------------------------------


def finish(edit: Edit, *, as_json: bool) -> int:
    """Show how an edit ended; the exit code."""
    if as_json:
        click.echo(json.dumps(edit.as_json(), ensure_ascii=False))
    else:
        show_edit(edit)
        if edit.state == "rejected":
            click.secho(
                "It changes nothing. Other words or --paraphrase may help; "
                f"`edgert edits apply {edit.name}` applies it as it is.",
                dim=True,
                err=True,
            )
    return REJECTED if edit.state == "rejected" else 0


def tell_changed(what: str, edits: Iterable[Edit], *, as_json: bool) -> None:
    """Say what was done to some edits, such as "reverted"."""
    if as_json:
        click.echo(json.dumps({"edits": [edit.as_json() for edit in edits]}, ensure_ascii=False))
        return
    for edit in edits:
        click.echo(f"{what} {edit.name}")


def show_edit(edit: Edit) -> None:
    """One edit, with its checks."""
    state = click.style(edit.state, fg=STATE_COLOURS.get(edit.state))
    click.echo(f"{edit.name} ({edit.model}): {state}")
    for line in _request_lines(edit):
        click.echo(f"  {_plain(line)}")
    if edit.error:
        click.echo(f"  {_plain(edit.error)}")
    report = edit.report
    if report is None:
        return
    for reason in report.reasons:
        click.echo(f"  {_plain(reason)}")
    click.echo()
    show_checks(report.checks)
    parts = [f"{report.steps} steps", f"{report.seconds:.1f} s", f"{report.rows:,.0f} rows"]
    parts.append(f"layer {report.layer}")
    if report.memory_bytes:
        parts.append(f"{size_text(report.memory_bytes)} of memory")
    click.secho(" · ".join(parts), dim=True)


def _request_lines(edit: Edit) -> list[str]:
    if edit.fact is not None:
        lines = [f"{edit.fact.prompt} → {edit.fact.target}"]
        return lines + [f"{text} → {edit.fact.target}" for text in edit.fact.paraphrases]
    refusal = edit.refusal or "a refusal"
    return [f"{query.prompt} → {refusal}" for query in edit.queries]


def show_checks(checks: Iterable[EditCheck]) -> None:
    """A table: check, before, after, needed."""
    shown = table("CHECK", "BEFORE", "AFTER", "NEEDED", "ASKED", "", right=frozenset({1, 2, 3, 4}))
    for check in checks:
        if check.asked:
            shown.add_row(
                check.name,
                share_text(check.before),
                share_text(check.after),
                share_text(check.needed),
                str(check.asked),
                "" if check.passed else "failed",
            )
    shown.print()


def share_text(value: float | None) -> str:
    """88 %; a dash where there is nothing to tell."""
    return "-" if value is None else f"{value:.0%}".replace("%", " %")


# --- all of them ------------------------------------------------------------------------------


def show_list(edits: Iterable[Edit]) -> None:
    """A table of edits and adapters."""
    shown = table("NAME", "STATE", "MODEL", "SUCCESS", "SAME SUBJECT", "UNRELATED", "CHANGED", "WHAT")
    for edit in edits:
        found = {check.name: check.after for check in edit.report.checks} if edit.report else {}
        shown.add_row(
            edit.name,
            edit.state,
            edit.model,
            *(share_text(found.get(name)) for name in ("success", "same subject", "unrelated")),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(edit.changed)),
            _short(what(edit)),
        )
    shown.print()


def what(edit: Edit) -> str:
    """An edit in a line."""
    if edit.fact is not None:
        return f"{edit.fact.prompt} → {edit.fact.target}"
    if edit.queries:
        more = f" and {len(edit.queries) - 1} more" if len(edit.queries) > 1 else ""
        return f"forgets: {edit.queries[0].prompt}{more}"
    return "an adapter"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _plain(text: str) -> str:
    """Text of a request on one line, without anything that could command the terminal."""
    return "".join(character for character in text if character.isprintable())


def as_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """What JSON has of them."""
    return [edit.as_json() for edit in edits]
