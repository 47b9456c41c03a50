"""``edgert chat``: a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.answer import Answer, Answerer, Choices, show_timings, stream, write_text
from edge_runtime.cli.options import adapter_options, cluster_options, engine_options, sampling_options
from edge_runtime.cli.remote import local_option
from edge_runtime.errors import ChatTemplateError, ContextOverflowError, RequestError

if TYPE_CHECKING:
    from edge_runtime.engine.sampling import SamplingParameters

Message = dict[str, str]

_HELP = """\
/reset   forget the conversation
/help    this list
/exit    leave (also Ctrl-D)
Ctrl-C stops an answer."""


@click.command("chat")
@engine_options
@sampling_options
@cluster_options
@adapter_options
@click.option("--system", metavar="TEXT", help="Instructions that come before the conversation.")
@click.option("-v", "--verbose", is_flag=True, help="Show speed after every answer.")
@local_option
@click.pass_context
def command(invocation: click.Context, /, system: str | None, verbose: bool, **shared: Any) -> None:
    """Talk with a model.

    Each line is a message; the model sees the whole conversation. Where standard input is no terminal, its
    lines are the messages. A running daemon answers, if there is one, unless --local, a model's path or an
    option of loading is given.
    """
    choices = Choices(**shared)
    sampling = choices.sampling()
    choices.adapters()  # refused before the model loads
    with choices.open(invocation) as engine:
        if engine.chat_template is None:
            raise ChatTemplateError(
                "this model has no chat template, so it cannot hold a conversation; "
                "continue plain text with `edgert run`"
            )
        interactive = sys.stdin.isatty()
        if interactive:
            title = getattr(engine, "title", choices.model)
            click.secho(f"{title} · context {engine.context} tokens · /help, /exit", dim=True, err=True)
        conversation = Conversation(engine, system, choices, sampling)
        for line in _lines(interactive):
            if line in ("/exit", "/quit"):
                break
            try:
                _take(line, conversation, verbose)
            except KeyboardInterrupt:
                if not interactive:
                    raise


class Conversation:
    """Messages so far, and what answers them.

    Args:
        system: instructions that stay first, None for none.
    """

    def __init__(
        self, engine: Answerer, system: str | None, choices: Choices, sampling: SamplingParameters
    ) -> None:
        self._engine = engine
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._choices = choices
        self._sampling = sampling
        self._adapters = choices.adapters()
        self.turns: list[Message] = []
        self._asked: list[Message] = []

    def reset(self) -> None:
        """Forget every turn; the system text stays."""
        self.turns.clear()

    def ask(self, text: str) -> tuple[Answer, int]:
        """Begin the answer to a message; the oldest turns go where the context has no room for all.

        Room for an answer is part of it: ``max_tokens``, at most a quarter of the context. Nothing is kept
        until :meth:`answered`.

        Returns:
            the answer in progress, and how many messages were dropped.

        Raises:
            ContextOverflowError: the message alone is too long.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        wanted_room = min(self._choices.max_tokens or self._engine.context, self._engine.context // 4)
        while True:
            last_resort = len(turns) < 3
            try:
                generation = self._begin(turns)
                if last_resort or self._engine.context - generation.prompt_tokens >= wanted_room:
                    dropped = len(self.turns) + 1 - len(turns)
                    self._asked = turns
                    return generation, dropped
                generation.close()
            except ContextOverflowError:
                if last_resort:
                    raise
            # A question goes with its answer: templates want the two in turn.
            del turns[:2]

    def _begin(self, turns: list[Message]) -> Answer:
        return self._engine.chat(
            [*self._system, *turns],
            sampling=self._sampling,
            max_tokens=self._choices.max_tokens,
            stop=self._choices.stop,
            adapters=self._adapters,
        )

    def answered(self, text: str) -> None:
        """Keep the last question and its answer, however far that came."""
        self.turns = [*self._asked, {"role": "assistant", "content": text}]


def _lines(interactive: bool) -> Iterator[str]:
    """Messages without the white space around them; empty ones are skipped."""
    if not interactive:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    import readline  # noqa: F401 - gives input() history and editing

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.secho("\n/exit or Ctrl-D leaves", dim=True, err=True)
            continue
        if line:
            yield line


def _take(line: str, conversation: Conversation, verbose: bool) -> None:
    if line == "/help":
        click.echo(_HELP, err=True)
    elif line == "/reset":
        conversation.reset()
        click.secho("the conversation is forgotten", dim=True, err=True)
    elif line.startswith("/"):
        click.secho(f"there is no {line.split()[0]}; /help lists what there is", fg="yellow", err=True)
    else:
        _answer(line, conversation, verbose)


def _answer(line: str, conversation: Conversation, verbose: bool) -> None:
    try:
        generation, dropped = conversation.ask(line)
    except RequestError as error:
        if not sys.stdin.isatty():
            raise
        click.secho(str(error), fg="yellow", err=True)
        return
    if dropped:
        notice = f"the context is full: the oldest {dropped} messages are forgotten (/reset forgets all)"
        click.secho(notice, fg="yellow", err=True)
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        write_text(text)

    try:
        stream(generation, show, title=f"reading {generation.prompt_tokens} tokens")
    except KeyboardInterrupt:
        write_text(" …")
        raise
    finally:
        write_text("\n")
        conversation.answered("".join(pieces))
    if generation.finish_reason == "length":
        click.secho("(cut short: --max-tokens reached or the context is full)", fg="yellow", err=True)
    if verbose:
        show_timings(generation)
