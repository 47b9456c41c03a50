"""``edgert config``: the daemon's settings."""

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "config",
    cls=LazyGroup,
    verbs={
        "show": ("edge_runtime.cli.config.show", "Show the settings that hold."),
        "path": ("edge_runtime.cli.config.path", "Show which file the settings come from."),
    },
)
def command() -> None:
    """Show the daemon's settings.

    They come from one TOML file; above it stand variables EDGERT_SECTION_KEY such as EDGERT_SERVER_HTTP, and
    above these the options of `edgert serve`.
    """
