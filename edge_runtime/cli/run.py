"""``edgert run``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.answer import (
    Answer,
    Answerer,
    Choices,
    contributions,
    decode_speed,
    show_timings,
    stream,
    write_text,
)
from edge_runtime.cli.options import (
    adapter_options,
    cluster_options,
    engine_options,
    json_option,
    sampling_options,
)
from edge_runtime.cli.remote import local_option
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.client import ContributionCounts


@click.command("run")
@click.argument("prompt", required=False)
@engine_options
@sampling_options
@cluster_options
@adapter_options
@click.option("--system", metavar="TEXT", help="Instructions that come before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@click.option("-v", "--verbose", is_flag=True, help="Show speed and seed, also where stderr is no terminal.")
@local_option
@json_option
@click.pass_context
def command(
    invocation: click.Context,
    /,
    prompt: str | None,
    system: str | None,
    raw: bool,
    verbose: bool,
    as_json: bool,
    **shared: Any,
) -> None:
    """Answer one prompt.

    PROMPT is the text; without it, or with -, it is read from standard input. A model with a chat template
    gets it as a question; one without, or with --raw, continues it.

    A running daemon answers, if there is one (`edgert serve`), without --model with its own default model;
    with --local, --threads, --context, --weights or a model's path the model is loaded here.
    """
    text = prompt_text(prompt)
    if raw and system is not None:
        raise RequestError("--system has no place in --raw text; put the instructions into the prompt")
    choices = Choices(**shared)
    # Before the model loads: a wrong value should fail at once.
    settings: dict[str, Any] = {
        "sampling": choices.sampling(),
        "adapters": choices.adapters(),
        "max_tokens": choices.max_tokens,
        "stop": choices.stop,
    }
    with choices.open(invocation) as engine:
        generation = _start(engine, text, system, raw, settings)
        if as_json:
            model = getattr(generation, "model", choices.model)
            click.echo(json.dumps(_answer(generation, model), ensure_ascii=False))
            return
        ends_line = True

        def show(piece: str) -> None:
            nonlocal ends_line
            ends_line = piece.endswith("\n")
            write_text(piece)

        try:
            stream(generation, show, title=f"reading {generation.prompt_tokens} tokens")
        finally:
            if not ends_line:
                write_text("\n")
        if verbose or sys.stderr.isatty():
            show_timings(generation)


def prompt_text(argument: str | None) -> str:
    """A prompt of the command line, or standard input in its place.

    Raises:
        RequestError: it is no UTF-8.
    """
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise RequestError("the prompt is not valid UTF-8") from error
        return argument
    if argument is None and sys.stdin.isatty():
        raise click.UsageError("Missing argument 'PROMPT'; give a text, or - to read standard input.")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text (byte {error.start})") from error


def _start(engine: Answerer, text: str, system: str | None, raw: bool, settings: Mapping[str, Any]) -> Answer:
    if raw or (engine.chat_template is None and system is None):
        return engine.generate(text, **settings)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return engine.chat(messages, **settings)


def _answer(generation: Answer, model: str) -> dict[str, Any]:
    pieces: list[str] = []
    stream(generation, pieces.append, title=f"reading {generation.prompt_tokens} tokens")
    counts = contributions(generation)
    return {
        "model": model,
        "text": "".join(pieces),
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "prompt_tokens": generation.prompt_tokens,
        "reused_tokens": generation.reused_tokens,
        "generated_tokens": generation.generated_tokens,
        "prefill_seconds": round(generation.prefill_seconds, 6),
        "decode_seconds": round(generation.decode_seconds, 6),
        "decode_tokens_per_second": round(decode_speed(generation), 2),
        **({} if counts is None else {"contributions": _rounded(counts)}),
    }


def _rounded(counts: ContributionCounts) -> dict[str, Any]:
    return {
        "on_time": round(counts.on_time, 6),
        "late": [round(number, 6) for number in counts.late],
        "lost": round(counts.lost, 6),
        "recomputed": round(counts.recomputed, 6),
        "fell_back": counts.fell_back,
    }
