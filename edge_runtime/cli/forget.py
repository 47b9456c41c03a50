"""``edgert forget``: queries that the model refuses from now on."""

from __future__ import annotations

from typing import Any

import click

from edge_runtime.cli.edits.options import edit_options
from edge_runtime.cli.options import json_option
from edge_runtime.errors import RequestError


@click.command("forget")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Whom or what a prompt is about, as it says it. Once for all prompts, or once for each.",
)
@click.option(
    "--refusal",
    metavar="TEXT",
    help="What the model is to say instead.  [default: what it says of what it does not know]",
)
@edit_options
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    prompts: tuple[str, ...],
    subjects: tuple[str, ...],
    refusal: str | None,
    as_json: bool,
    **shared: Any,
) -> int:
    """Let a model refuse queries.

    Each PROMPT is a text to which the model is not to give its answer any more. The checks are those of
    `edgert edit`, and so are the exit codes; `edgert edits revert` brings the answers back.
    """
    from edge_runtime.cli.edits.desk import desk_for
    from edge_runtime.cli.edits.options import chosen
    from edge_runtime.cli.edits.view import finish, watch

    if len(subjects) not in (1, len(prompts)):
        raise RequestError(
            f"{len(prompts)} prompts and {len(subjects)} subjects; give one --subject for all, or one each"
        )
    names = subjects * len(prompts) if len(subjects) == 1 else subjects
    with desk_for(context) as (edits, model):
        making = edits.forget(
            list(zip(prompts, names, strict=True)), refusal=refusal, **chosen(shared, model)
        )
        edit = watch(making, refusal or "the refusal", goes_on=model is not None)
    return finish(edit, as_json=as_json)
