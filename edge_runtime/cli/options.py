"""Options that several verbs share. Ranges are checked where the values are used, in the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# The defaults of SamplingParameters; importing that would import numpy.
SAMPLING_DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.0,
}


def _all(options: list[Callable[[Decorated], Decorated]]) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "-m",
    "--model",
    default="demo",
    metavar="NAME|PATH",
    envvar="EDGERT_MODEL",
    show_default=True,
    show_envvar=True,
    help="A model of the store, or a GGUF file.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")

weights_option = click.option(
    "--weights",
    type=click.Choice(["repack", "mmap"]),
    default="repack",
    show_default=True,
    help="repack: copied to the fastest layout. mmap: left in the file, for little memory.",
)

threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    metavar="N",
    envvar="EDGERT_THREADS",
    show_envvar=True,
    help="CPU threads; without it, the physical cores, or one for a model below 32 MiB.",
)

engine_options = _all(
    [
        model_option,
        threads_option,
        click.option(
            "-c",
            "--context",
            type=int,
            metavar="TOKENS",
            help="Room for prompt and answer.  [default: the model's own, at most 4096]",
        ),
        weights_option,
    ]
)

sampling_options = _all(
    [
        click.option(
            "-n",
            "--max-tokens",
            type=int,
            metavar="N",
            help="At most N tokens.  [default: until the model ends]",
        ),
        click.option(
            "--temperature",
            metavar="NUMBER",
            type=float,
            default=SAMPLING_DEFAULTS["temperature"],
            show_default=True,
            help="0 always takes the likeliest token; higher is more varied.",
        ),
        click.option(
            "--top-k",
            metavar="K",
            type=int,
            default=SAMPLING_DEFAULTS["top_k"],
            show_default=True,
            help="Choose among the K likeliest tokens; 0: all.",
        ),
        click.option(
            "--top-p",
            metavar="P",
            type=float,
            default=SAMPLING_DEFAULTS["top_p"],
            show_default=True,
            help="Choose among the likeliest tokens that together have this probability.",
        ),
        click.option(
            "--min-p",
            metavar="P",
            type=float,
            default=SAMPLING_DEFAULTS["min_p"],
            show_default=True,
            help="Drop tokens less likely than this share of the likeliest.",
        ),
        click.option(
            "--repeat-penalty",
            "repetition_penalty",
            metavar="NUMBER",
            type=float,
            default=SAMPLING_DEFAULTS["repetition_penalty"],
            show_default=True,
            help="Above 1 makes tokens of the last 64 less likely.",
        ),
        click.option(
            "--seed", type=int, metavar="N", help="Same seed, same text.  [default: a new one each time]"
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated."),
    ]
)

# Of a model that the daemon has spread over a cluster.
cluster_options = _all(
    [
        click.option(
            "--mode",
            type=click.Choice(["exact", "relaxed"]),
            help="Of a daemon's model that is spread over several devices. exact: waits for each. relaxed: "
            "adds what comes late when it comes.  [default: the daemon's setting]",
        ),
        click.option(
            "--quality",
            metavar="Q",
            type=float,
            help="What --mode relaxed may lose; 0.99: a perplexity 1 % worse.  "
            "[default: the daemon's setting]",
        ),
    ]
)

adapter_options = _all(
    [
        click.option(
            "--adapter",
            "adapter",
            multiple=True,
            metavar="NAME[=STRENGTH]",
            help="Answer with this edit or adapter, and no others. May be repeated.  [default: all that are "
            "applied]",
        ),
        click.option(
            "--no-adapters", is_flag=True, help="Answer as the model does without any edit or adapter."
        ),
    ]
)
