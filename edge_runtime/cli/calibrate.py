"""``edgert calibrate``: what a model loses when other devices answer late."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import size_text, table
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.cluster.calibration_file import Calibration

_MAX_TEXT_BYTES = 1 << 26
_QUALITIES = (0.98, 0.99, 0.995)
_HALF = 0.5


@click.command("calibrate")
@click.argument("model", metavar="NAME|PATH")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="UTF-8 text like what the model is used for. Form feeds separate documents.",
)
@click.option(
    "--group-size",
    type=click.IntRange(1),
    metavar="N",
    help="Neurons in a group.  [default: 1/16 of a layer or less]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    metavar="N",
    help="Use so many tokens of the text at most.",
)
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 512),
    metavar="N",
    envvar="EDGERT_THREADS",
    show_envvar=True,
    help="CPU threads; without it, one or the physical cores, whichever is faster now.",
)
@json_option
def command(
    model: str, text: Path, group_size: int | None, tokens: int, threads: int | None, as_json: bool
) -> None:
    """Measure what a model loses when other devices answer late.

    What is found is kept beside the model. A cluster's `relaxed` mode needs it, and `exact` places the parts
    that matter most by it. A running daemon notices it when it loads the model the next time.

    The text is read some 45 times for a model of 6 layers, 130 times for one of 22.
    """
    from edge_runtime.cluster.calibration import calibrate
    from edge_runtime.cluster.calibration_file import save_calibration
    from edge_runtime.engine.gguf import GGUFFile
    from edge_runtime.model_store.store import ModelStore

    found = ModelStore().resolve(model)
    content = _read(text)
    with Bar(f"calibrating {found.name}", estimates=True) as bar:
        calibration = calibrate(
            found.path,
            content,
            group_size=group_size,
            threads=threads,
            max_tokens=tokens,
            progress=bar.update,
        )
    with GGUFFile(found.path) as gguf:
        path = save_calibration(calibration, gguf)
    if as_json:
        click.echo(json.dumps(_facts(calibration, found.name, path)))
        return
    _show(calibration, found.name, path)


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise RequestError(
            f"{path} has {size_text(size)}; at most {size_text(_MAX_TEXT_BYTES)} are read: give a part of it"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text (byte {error.start}); convert it first") from error


def _facts(calibration: Calibration, name: str, path: Path) -> dict[str, Any]:
    rungs = calibration.response.rungs
    return {
        "model": name,
        "path": str(path),
        "tokens": calibration.n_tokens,
        "perplexity": calibration.perplexity,
        "group_size": calibration.group_size,
        "groups": calibration.importance.shape[1],
        "fill": calibration.fill,
        "shares": list(rungs[0].shares),
        "syncs": [
            {
                "boundaries": list(rung.syncs),
                "perplexity_ratios": [math.exp(increase) for increase in rung.increases],
                "divergences": divergences,
                "increases": increases,
            }
            for rung, divergences, increases in zip(
                rungs, calibration.divergences.tolist(), calibration.increases.tolist(), strict=True
            )
        ],
        "waits_for_half": {
            str(quality): len(calibration.response.syncs_for(_HALF, 0.0, quality)) for quality in _QUALITIES
        },
    }


def _show(calibration: Calibration, name: str, path: Path) -> None:
    n_layers, n_groups = calibration.importance.shape
    click.echo(
        f"{name}: {n_layers} layers of {n_groups} groups of {calibration.group_size} neurons, "
        f"{calibration.n_tokens} tokens, perplexity {calibration.perplexity:.3f}"
    )
    rungs = calibration.response.rungs
    shares = [f"{share:.0%} ELSEWHERE" for share in rungs[0].shares]
    shown = table("WAITS A TOKEN", *shares, right=frozenset(range(len(shares) + 1)))
    for rung in rungs:
        shown.add_row(str(len(rung.syncs)), *(_loss_text(increase) for increase in rung.increases))
    shown.print()
    for quality in _QUALITIES:
        waits = len(calibration.response.syncs_for(_HALF, 0.0, quality))
        times = "wait" if waits == 1 else "waits"
        click.echo(f"quality {quality}: {waits} {times} a token with half of each layer elsewhere")
    click.echo(f"kept in {path} ({size_text(path.stat().st_size)})")


def _loss_text(increase: float) -> str:
    """By how much the perplexity grows."""
    if increase > math.log(10):
        return "over x10"
    growth = math.expm1(max(increase, 0.0))
    return f"+{growth:.2%}" if growth < 1 else f"x{growth + 1:.1f}"
