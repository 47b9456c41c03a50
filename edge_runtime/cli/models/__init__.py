"""``edgert models``: the store."""

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "models",
    cls=LazyGroup,
    verbs={
        "list": ("edge_runtime.cli.models.list", "List the models on this device."),
        "show": ("edge_runtime.cli.models.show", "Show what a model is."),
        "pull": ("edge_runtime.cli.models.pull", "Fetch a model from a hub or a web address."),
        "import": ("edge_runtime.cli.models.import_", "Put a GGUF file of yours into the store."),
        "rm": ("edge_runtime.cli.models.rm", "Remove a model from the store."),
    },
)
def command() -> None:
    """List, fetch and remove models.

    They lie in the user's data folder; EDGERT_HOME chooses another place.
    """
