"""``edgert cluster``."""

import click

from edge_runtime.cli.lazy import LazyGroup


@click.group(
    "cluster",
    cls=LazyGroup,
    verbs={
        "invite": (
            "edge_runtime.cli.cluster.invite",
            "Let another device join; the first time, found a cluster.",
        ),
        "join": ("edge_runtime.cli.cluster.join", "Join with an invitation."),
        "status": ("edge_runtime.cli.cluster.status", "Show the members and who computes what."),
        "plan": ("edge_runtime.cli.cluster.plan", "Show why a model is spread as it is."),
        "bench": ("edge_runtime.cli.cluster.bench", "Measure how long a token takes in each mode."),
        "leave": ("edge_runtime.cli.cluster.leave", "Leave the cluster."),
        "remove": (
            "edge_runtime.cli.cluster.remove",
            "Take another device out of the cluster that this one founded.",
        ),
    },
)
def command() -> None:
    """Let several devices answer together.

    One device founds the cluster with `invite` and gives the invitation to the next one, which uses it with
    `join`. From then on each one's daemon may have the others compute parts of its models. What a device
    lends and where it listens is in the section [cluster] of its settings.
    """
