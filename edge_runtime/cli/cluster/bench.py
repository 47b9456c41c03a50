"""``edgert cluster bench``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import click

from edge_runtime.cli.cluster.model_view import headline, used_nodes
from edge_runtime.cli.cluster.report import Report, model_of, needed_status
from edge_runtime.cli.cluster.wording import count, milliseconds, plain
from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import table
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.client import Client, ContributionCounts

_PROMPT = "Once upon a time"
_TITLES = ("MODE", "ANSWERS", "TOKENS", "P50", "P95", "ON TIME", "LATE", "LOST", "RECOMPUTED", "FELL BACK")

Mode = Literal["exact", "relaxed"]


@dataclass(slots=True)
class Measured:
    """What one mode took.

    Attributes:
        token_seconds: between one token and the next, of all answers.
        on_time, late, lost, recomputed: other devices' contributions.
        fell_back: answers that went on exactly, because they reached their quality's bound.
    """

    mode: Mode
    answers: int = 0
    token_seconds: list[float] = field(default_factory=list)
    on_time: float = 0.0
    late: float = 0.0
    lost: float = 0.0
    recomputed: float = 0.0
    fell_back: int = 0

    def take(self, seconds: Sequence[float], counts: ContributionCounts | None) -> None:
        """One more answer."""
        self.answers += 1
        self.token_seconds += seconds
        if counts is not None:
            self.on_time += counts.on_time
            self.late += sum(counts.late)
            self.lost += counts.lost
            self.recomputed += counts.recomputed
            self.fell_back += counts.fell_back

    def percentile(self, part: float) -> float:
        """Seconds within which that part of the tokens came."""
        ordered = sorted(self.token_seconds)
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


@click.command("bench")
@click.argument("model", required=False, default="")
@click.option(
    "-n", "--tokens", type=click.IntRange(2), default=64, show_default=True, metavar="N", help="Of an answer."
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Answers in each mode.",
)
@click.option(
    "--quality",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="NUMBER",
    help="Of relaxed answers.  [default: the daemon's setting]",
)
@json_option
def command(model: str, tokens: int, rounds: int, quality: float | None, as_json: bool) -> None:
    """Measure how long a token takes in each mode.

    The daemon answers the same short request in turn in `exact` and, where the model was calibrated, in
    `relaxed`. MODEL is a model of the daemon's store; by default its default model.
    """
    from edge_runtime.client import Client

    _, status = needed_status()
    name = model or str(status["default_model"])
    with Client.local() as client:
        client.models.load(name)
        _, status = needed_status()
        spread = model_of(status["cluster"], name)
        found = [Measured("exact"), *([Measured("relaxed")] if spread["calibrated"] else [])]
        with Bar(f"measuring {plain(name)}", total=float(rounds * len(found))) as bar:
            for number in range(rounds):
                for place, one in enumerate(found):
                    _ask(client, name, one, tokens, quality)
                    bar.update(number * len(found) + place + 1, rounds * len(found))
    _, status = needed_status()  # the plan may have changed meanwhile
    spread = model_of(status["cluster"], name)
    if as_json:
        click.echo(json.dumps({"model": spread, "modes": [_as_json(one) for one in found]}))
    else:
        _show(spread, found)


def _ask(client: Client, name: str, into: Measured, tokens: int, quality: float | None) -> None:
    wish = quality if into.mode == "relaxed" else None
    seconds: list[float] = []
    stream = client.generate(
        _PROMPT, model=name, max_tokens=tokens, temperature=0, mode=into.mode, quality=wish
    )
    with stream:
        last = 0.0
        for chunk in stream:
            now = time.perf_counter()
            if last:  # the first one took reading the prompt
                seconds += [(now - last) / len(chunk.tokens)] * len(chunk.tokens)
            last = now
        usage = stream.usage
    if not seconds:
        raise RequestError(
            f"{name} ended its answer after one token, which measures nothing; choose another model"
        )
    into.take(seconds, usage.contributions if usage is not None else None)


def _as_json(measured: Measured) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(measured).items() if name != "token_seconds"}
    times = {"p50_seconds": measured.percentile(0.5), "p95_seconds": measured.percentile(0.95)}
    return facts | {"tokens": len(measured.token_seconds)} | times


def _show(spread: Report, found: Sequence[Measured]) -> None:
    click.echo(headline(spread, with_mode=False))
    rows = table(*_TITLES, right=frozenset(range(1, len(_TITLES))))
    for one in found:
        rows.add_row(
            one.mode,
            str(one.answers),
            str(len(one.token_seconds)),
            milliseconds(one.percentile(0.5)),
            milliseconds(one.percentile(0.95)),
            *map(count, (one.on_time, one.late, one.lost, one.recomputed, one.fell_back)),
        )
    rows.print()
    if len(used_nodes(spread)) == 1:
        click.echo(f"\nOnly this device computes, so the modes do not differ: {plain(spread['reason'])}")
    if not spread["calibrated"]:
        click.echo(
            "\nrelaxed was not measured: this model was never calibrated; `edgert calibrate MODEL --text "
            "FILE` does that"
        )
