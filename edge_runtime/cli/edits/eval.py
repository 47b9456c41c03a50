"""``edgert edits eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edge_runtime.cli.options import json_option, model_option, threads_option, weights_option
from edge_runtime.cli.remote import local_option
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.personalize.datasets import Item


@click.command("eval")
@click.argument("names", nargs=-1, metavar="[NAME|NUMBER...]")
@click.option(
    "--dataset",
    metavar="FILE|demo",
    help="Make the edits of a CounterFact or zsRE file instead, or of the demo model's world, one by one.",
)
@click.option(
    "--count", type=click.IntRange(1), default=20, show_default=True, help="Edits of the dataset at most."
)
@model_option
@threads_option
@weights_option
@local_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    names: tuple[str, ...],
    dataset: str | None,
    count: int,
    model: str,
    threads: int | None,
    weights: Literal["repack", "mmap"],
    as_json: bool,
    **_: Any,
) -> None:
    """Test edits again.

    Without names, all that are applied to the model, as they are now. What stands under BEFORE is without
    that one edit, and with all others.

    With --dataset, each fact of the file is edited alone in this process, asked for, and undone; the edits of
    this device are not touched.
    """
    if dataset is None:
        _evaluate(context, names, as_json)
        return
    if names:
        raise RequestError("--dataset makes edits of its own; give either names or a dataset")
    _evaluate_dataset(dataset, count, (model, threads, weights), as_json)


def _evaluate(context: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    from edge_runtime.cli.edits.desk import desk_for
    from edge_runtime.cli.edits.view import show_checks

    found = []
    with desk_for(context) as (edits, model), Bar("testing") as bar:
        for evaluation in edits.evaluate(names, model=model or ""):
            found.append(evaluation)
            if not as_json:
                bar.close()
                click.echo(evaluation.name)
                show_checks(evaluation.checks)
    if as_json:
        click.echo(json.dumps({"edits": [asdict(one) for one in found]}, ensure_ascii=False))
    elif not found:
        click.echo("no edits are applied")


def _evaluate_dataset(
    dataset: str, count: int, chosen: tuple[str, int | None, Literal["repack", "mmap"]], as_json: bool
) -> None:
    from edge_runtime.cli.edits.local import loaded
    from edge_runtime.personalize.datasets import evaluate_items, summary
    from edge_runtime.personalize.statistics import load_statistics

    items = _items(dataset, count)
    with loaded(*chosen) as engine, Bar(f"editing {len(items)} facts", estimates=True) as bar:
        statistics = load_statistics(engine.gguf)
        outcomes = evaluate_items(engine, statistics, items, lambda done, _: bar.update(done, len(items)))
    found = {"dataset": dataset, "model": chosen[0], **summary(outcomes)}
    if as_json:
        every = [
            {"item": asdict(item), "outcome": asdict(one)} for item, one in zip(items, outcomes, strict=True)
        ]
        click.echo(json.dumps({**found, "edits": every}, ensure_ascii=False))
        return
    _show(found)


def _items(dataset: str, count: int) -> list[Item]:
    from edge_runtime.model_store.paths import demo_model_path
    from edge_runtime.personalize.datasets import demo_items, read_dataset

    if dataset == "demo":
        return demo_items(demo_model_path().with_name("facts.json"), count)
    path = Path(dataset)
    if not path.is_file():
        raise RequestError(f"{dataset} is no file; give a CounterFact or zsRE file, or demo")
    return read_dataset(path, count)


def _show(found: dict[str, Any]) -> None:
    from edge_runtime.cli.edits.view import share_text
    from edge_runtime.cli.present import table

    click.echo(f"{found['dataset']} on {found['model']}: {found['made']} of {found['items']} edits made")
    rows = table("SHARE OF ANSWERS", "BEFORE", "AFTER", right=frozenset({1, 2}))
    rows.add_row("success", share_text(found["success_before"]), share_text(found["success"]))
    rows.add_row("paraphrases", share_text(found["paraphrases_before"]), share_text(found["paraphrases"]))
    rows.add_row("unchanged about others", "-", share_text(found["others"]))
    rows.add_row("passed its own checks", "-", share_text(found["passed"]))
    rows.print()
    if found["made"]:
        click.secho(
            f"mean of an edit: {found['steps']:.1f} steps · {found['rows']:,.0f} rows · "
            f"{found['seconds']:.1f} s",
            dim=True,
        )
    for error in dict.fromkeys(found["errors"]):
        click.secho(error, dim=True, err=True)
