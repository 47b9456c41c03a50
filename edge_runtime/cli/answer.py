"""Loading an engine and streaming its answers, for the verbs that show text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.terminal import Bar, printable

if TYPE_CHECKING:
    from edge_runtime.engine.engine import Engine
    from edge_runtime.engine.generation import Generation
    from edge_runtime.engine.sampling import SamplingParameters


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

    def load(self) -> Engine:
        """The engine with its model, behind a progress bar.

        Raises:
            EdgeRuntimeError: no such model, or one that cannot be loaded.
        """
        from edge_runtime.model_store.store import ModelStore

        model = ModelStore().resolve(self.model)
        from edge_runtime.engine.engine import Engine, EngineOptions

        options = EngineOptions(threads=self.threads, context=self.context, weights=self.weights)
        with Bar(f"loading {model.name}") as bar:
            return Engine.load(model.path, options, bar.update)


def stream(generation: Generation, write: Callable[[str], None], *, title: str) -> None:
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


def decode_speed(generation: Generation) -> float:
    """Tokens a second after the first one; 0 where there was none."""
    # The first token comes with the prompt; an answer that the model ends takes one step more.
    steps = generation.generated_tokens - (generation.finish_reason != "stop")
    return steps / generation.decode_seconds if steps > 0 and generation.decode_seconds > 0 else 0.0


def timings(generation: Generation) -> str:
    """One line about an answer's speed."""
    computed = generation.prompt_tokens - generation.reused_tokens
    kept = f", {generation.reused_tokens} kept from before" if generation.reused_tokens else ""
    parts = [
        f"{generation.generated_tokens} tokens at {decode_speed(generation):.0f}/s",
        f"prompt of {generation.prompt_tokens} in {generation.prefill_seconds:.2f} s"
        f" ({computed / max(generation.prefill_seconds, 1e-9):.0f}/s{kept})",
        f"seed {generation.seed}",
    ]
    return " · ".join(parts)


def show_timings(generation: Generation) -> None:
    """The line on standard error, in the background's colour."""
    click.secho(timings(generation), dim=True, err=True)
