"""Options that the verbs which make edits share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from edge_runtime.cli.options import model_option, threads_option, weights_option
from edge_runtime.cli.remote import local_option

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--name", metavar="NAME", help="What to call the edit.  [default: edit-NUMBER]"),
    click.option("--force", is_flag=True, help="Apply it even if it fails its checks."),
    click.option("--steps", type=int, metavar="N", help="Search for N steps at most."),
    click.option("--seconds", type=float, metavar="S", help="Search for S seconds at most."),
    model_option,
    threads_option,
    weights_option,
    local_option,
)


def edit_options(function: Decorated) -> Decorated:
    """All of them."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def chosen(shared: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """What of them goes with the request for an edit.

    Args:
        model: in the daemon's store; None where this process makes the edit and knows the model already.
    """
    found = {name: shared[name] for name in ("name", "force", "steps", "seconds")}
    return found if model is None else {**found, "model": model}
