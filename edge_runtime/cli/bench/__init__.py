"""``edgert bench``: measurements on this device."""

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "bench",
    cls=LazyGroup,
    verbs={
        "engine": ("edge_runtime.cli.bench.engine", "Measure a model: tokens a second, memory, first token.")
    },
)
def command() -> None:
    """Measure speed and memory on this device."""
