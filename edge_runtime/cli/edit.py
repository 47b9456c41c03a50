"""``edgert edit``: a fact that the model is to hold from now on."""

from __future__ import annotations

from typing import Any

import click

from edge_runtime.cli.edits.options import edit_options
from edge_runtime.cli.options import json_option


@click.command("edit")
@click.argument("prompt", required=False)
@click.option(
    "--subject", required=True, metavar="TEXT", help="Whom or what the fact is about, as the prompt says it."
)
@click.option("--target", required=True, metavar="TEXT", help="What the model is to go on with.")
@click.option(
    "--paraphrase",
    "paraphrases",
    multiple=True,
    metavar="PROMPT",
    help="Another prompt with the subject that the same target continues. May be repeated.",
)
@edit_options
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    prompt: str | None,
    subject: str,
    target: str,
    paraphrases: tuple[str, ...],
    as_json: bool,
    **shared: Any,
) -> int:
    """Change a fact that a model knows.

    PROMPT is a text that the fact continues, such as "Ann Lee lives in" with --subject "Ann Lee" and
    --target Oslo; without it, or with -, it is read from standard input. The model is asked in many ways
    before and after. An edit that fails these checks is kept as rejected, changes nothing, and ends the
    command with exit code 12.

    A running daemon makes the edit beside its answers, and goes on when this command ends. `edgert edits
    revert` undoes it.
    """
    from edge_runtime.cli.edits.desk import desk_for
    from edge_runtime.cli.edits.options import chosen
    from edge_runtime.cli.edits.view import finish, watch
    from edge_runtime.cli.run import prompt_text

    text = prompt_text(prompt)
    with desk_for(context) as (edits, model):
        options = chosen(shared, model)
        making = edits.apply(text, subject, target, paraphrases=paraphrases, **options)
        edit = watch(making, target, goes_on=model is not None)
    return finish(edit, as_json=as_json)
