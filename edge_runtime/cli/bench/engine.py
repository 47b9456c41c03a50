"""``edgert bench engine``: how fast a model runs here."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_runtime.cli.options import json_option, model_option, weights_option
from edge_runtime.cli.present import count_text, mix_text, size_text, table
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import RequestError


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers like 1,2,4") from error
    if any(number < 1 for number in numbers):
        raise click.BadParameter("numbers start at 1")
    return tuple(dict.fromkeys(numbers))


@click.command("engine")
@model_option
@click.option(
    "-t",
    "--threads",
    callback=_numbers,
    metavar="N,N",
    help="Thread counts.  [default: 1, 2, 4 .. physical cores]",
)
@click.option(
    "--prefill",
    callback=_numbers,
    default="128,512",
    show_default=True,
    metavar="N,N",
    help="Prompt lengths in tokens; longer ones than the context are left out.",
)
@click.option(
    "--decode", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Tokens to generate."
)
@weights_option
@json_option
def command(
    model: str, threads: tuple[int, ...], prefill: tuple[int, ...], decode: int, weights: str, as_json: bool
) -> None:
    """Measure a model: tokens a second, memory, first token.

    Every number of threads is measured in a process of its own. Prefill is the prompt, decode the answer;
    the first token is timed from the start of the process, with a prompt of 16 tokens.
    """
    from edge_runtime.cli.bench.measure import Task, measure
    from edge_runtime.engine.backend import default_threads
    from edge_runtime.model_store.store import ModelStore
    from edge_runtime.model_store.summary import summarize

    found = ModelStore().resolve(model)
    summary = summarize(found.path)
    counts = threads or _doubling(default_threads())
    if max(counts) > 512:
        raise RequestError(f"{max(counts)} threads were asked for; possible are 1 to 512")
    runs: list[dict[str, Any]] = []
    with Bar(f"measuring {found.name}") as bar:
        for number, count in enumerate(counts):
            task = Task(str(found.path), count, prefill, decode, weights)
            runs.append(
                measure(task, lambda share, done=number: bar.update((done + share) / len(counts)))  # type: ignore[misc]
            )
    if as_json:
        facts = {"model": found.name, "path": str(found.path), "summary": summary.as_json()}
        click.echo(json.dumps({**facts, "weights": weights, "runs": runs}))
        return
    click.echo(
        f"{found.name}: {summary.architecture}, {count_text(summary.parameters)} parameters in "
        f"{mix_text(summary.quantization, most=1)}, {size_text(summary.size)}"
    )
    _show(runs, prefill)


def _doubling(most: int) -> tuple[int, ...]:
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return tuple(dict.fromkeys([*counts, most]))


def _show(runs: list[dict[str, Any]], prefill: tuple[int, ...]) -> None:
    lengths = [length for length in prefill if str(length) in runs[0]["prefill"]]
    titles = [f"PREFILL {length}" for length in lengths]
    columns = ["THREADS", *titles, "DECODE", "LOAD", "FIRST TOKEN", "PEAK MEMORY"]
    shown = table(*columns, right=frozenset(range(len(columns))))
    for run in runs:
        shown.add_row(
            str(run["threads"]),
            *(f"{run['prefill'][str(length)]:.0f}/s" for length in lengths),
            f"{run['decode']:.1f}/s",
            f"{run['load_seconds']:.2f} s",
            f"{run['first_token_seconds']:.2f} s",
            size_text(run["peak_bytes"]),
        )
    shown.print()
    if left_out := [str(length) for length in prefill if length not in lengths]:
        context = runs[0]["context"]
        click.secho(
            f"left out: {', '.join(left_out)} tokens; the context holds {context}", dim=True, err=True
        )
