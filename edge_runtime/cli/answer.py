"""Finding what answers, an engine or the daemon, and streaming its answers, for the verbs that show text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import click

from edge_runtime.cli.terminal import Bar, printable
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.cli.remote import RemoteEngine
    from edge_runtime.client import ContributionCounts, Mode
    from edge_runtime.engine.engine import Engine
    from edge_runtime.engine.sampling import SamplingParameters


class Answer(Protocol):
    """An answer in progress; iterating gives pieces that have a ``text``."""

    def __iter__(self) -> Iterator[Any]: ...
    def close(self) -> None:
        """Stop it."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def reused_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def prefill_seconds(self) -> float: ...
    @property
    def decode_seconds(self) -> float: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def seed(self) -> int: ...


class Answerer(Protocol):
    """What answers: an engine in this process, or the running daemon."""

    @property
    def context(self) -> int: ...
    @property
    def chat_template(self) -> object | None: ...
    def generate(
        self,
        prompt: str,
        *,
        sampling: SamplingParameters,
        max_tokens: int | None,
        stop: Sequence[str],
        adapters: Mapping[str, float] | None,
    ) -> Answer: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: SamplingParameters,
        max_tokens: int | None,
        stop: Sequence[str],
        adapters: Mapping[str, float] | None,
    ) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Choices:
    """What the shared options of ``run`` and ``chat`` were set to."""

    model: str
    threads: int | None
    context: int | None
    weights: Any
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    local: bool = False
    mode: Mode | None = None
    quality: float | None = None
    adapter: Sequence[str] = ()
    no_adapters: bool = False

    def adapters(self) -> dict[str, float] | None:
        """Name -> strength; None for all that are applied.

        Raises:
            RequestError: a strength that is no number, or options that exclude each other.
        """
        if self.no_adapters and self.adapter:
            raise RequestError("--no-adapters and --adapter exclude each other; give one of them")
        if not self.adapter:
            return {} if self.no_adapters else None
        found: dict[str, float] = {}
        for text in self.adapter:
            name, _, strength = text.partition("=")
            if name in found:
                raise RequestError(f"--adapter {name} is given twice; name each adapter once")
            try:
                found[name] = float(strength) if "=" in text else 1.0
            except ValueError:
                raise RequestError(f"--adapter {text}: {strength!r} is no number") from None
        return found

    def sampling(self) -> SamplingParameters:
        """The engine's parameters.

        Raises:
            RequestError: a value out of range.
        """
        from edge_runtime.engine.sampling import SamplingParameters

        return SamplingParameters(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            # Drawn here, so that it is short enough to be typed again and for every JSON reader.
            seed=int.from_bytes(os.urandom(4), "little") if self.seed is None else self.seed,
        )

    def open(self, invocation: click.Context) -> Engine | RemoteEngine:
        """The running daemon where it can answer, else an engine with its model.

        Args:
            invocation: of the command, which knows what was said on the command line.

        Raises:
            EdgeRuntimeError: as for :meth:`load`, or the daemon refuses.
            RequestError: a quality out of range.
        """
        from edge_runtime.cli.remote import daemon_for

        # Checked here because an engine never looks at it.
        if self.quality is not None and not 0 < self.quality <= 1:
            raise RequestError(f"quality = {self.quality}; needed is a number above 0, at most 1")
        daemon = daemon_for(invocation)
        if daemon is not None:
            return daemon
        if self.mode is not None or self.quality is not None:
            notice = "--mode and --quality change nothing: no daemon is asked, and one device alone is exact"
            click.secho(notice, fg="yellow", err=True)
        return self.load()

    def load(self) -> Engine:
        """The engine with its model and what is applied to it, behind a progress bar.

        Raises:
            EdgeRuntimeError: no such model, or one that cannot be loaded.
        """
        from edge_runtime.model_store.store import ModelStore

        model = ModelStore().resolve(self.model)
        from edge_runtime.engine.engine import Engine, EngineOptions

        options = EngineOptions(threads=self.threads, context=self.context, weights=self.weights)
        with Bar(f"loading {model.name}") as bar:
            engine = Engine.load(model.path, options, bar.update)
        try:
            apply_stored(engine)
        except BaseException:
            engine.close()
            raise
        return engine


def apply_stored(engine: Engine) -> None:
    """Apply to a model what this user's store of adapters says is applied to it.

    Raises:
        ConfigError: the store is damaged.
    """
    from edge_runtime.daemon.adapters import STORE_NAME, applied_to, identity_of
    from edge_runtime.model_store.paths import home

    store = home() / STORE_NAME
    if store.exists():
        engine.set_adapters(applied_to(engine, store, identity_of(engine)).changes)


def stream(generation: Answer, write: Callable[[str], None], *, title: str) -> None:
    """Hand over the text as it comes; a bar shows until the first of it does.

    Whatever ends it, the generation is closed, so that the engine is free for the next request.
    """
    with ExitStack() as stack:
        stack.callback(generation.close)
        bar = stack.enter_context(Bar(title))
        for piece in generation:
            if piece.text:
                bar.close()
                write(piece.text)


def write_text(text: str) -> None:
    """Show text at once."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def decode_speed(generation: Answer) -> float:
    """Tokens a second after the first one; 0 where there was none."""
    # The first token comes with the prompt; an answer that the model ends takes one step more.
    steps = generation.generated_tokens - (generation.finish_reason != "stop")
    return steps / generation.decode_seconds if steps > 0 and generation.decode_seconds > 0 else 0.0


def contributions(generation: Answer) -> ContributionCounts | None:
    """Of other devices to an answer; None where one computed alone, as an engine always does."""
    found: ContributionCounts | None = getattr(generation, "contributions", None)
    return found


def contributions_text(counts: ContributionCounts) -> str:
    """What became of them in shares of all: ``12 % late, 0.1 % lost``."""
    fates = {"late": sum(counts.late), "lost": counts.lost, "recomputed": counts.recomputed}
    everything = counts.on_time + sum(fates.values())
    parts = [f"{_percent(number / everything)} {fate}" for fate, number in fates.items() if number > 0]
    text = ", ".join(parts) or "all on time"
    return f"{text}, went on exactly at the quality's bound" if counts.fell_back else text


def _percent(share: float) -> str:
    if share < 0.0005:
        return "under 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def timings(generation: Answer) -> str:
    """One line about an answer's speed."""
    computed = generation.prompt_tokens - generation.reused_tokens
    kept = f", {generation.reused_tokens} kept from before" if generation.reused_tokens else ""
    parts = [
        f"{generation.generated_tokens} tokens at {decode_speed(generation):.0f}/s",
        f"prompt of {generation.prompt_tokens} in {generation.prefill_seconds:.2f} s"
        f" ({computed / max(generation.prefill_seconds, 1e-9):.0f}/s{kept})",
        f"seed {generation.seed}",
    ]
    counts = contributions(generation)
    if counts is not None:
        parts.append(f"contributions {contributions_text(counts)}")
    origin = getattr(generation, "origin", "")
    if origin:
        parts.append(origin)
    return " · ".join(parts)


def show_timings(generation: Answer) -> None:
    """The line on standard error, in the background's colour."""
    click.secho(timings(generation), dim=True, err=True)
