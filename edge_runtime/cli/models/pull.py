"""``edgert models pull``."""

from __future__ import annotations

import json
import sys

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import size_text
from edge_runtime.cli.terminal import Bar


@click.command("pull")
@click.argument("source")
@click.option("--name", metavar="NAME", help="Its name in the store.  [default: the file's]")
@click.option("--sha256", metavar="HEX", help="Refuse the file unless it hashes to this.")
@click.option("--replace", is_flag=True, help="Take the place of a model of the same name.")
@click.option("--offline", is_flag=True, help="Fetch nothing: succeed only if the store has it already.")
@json_option
def command(
    source: str, name: str | None, sha256: str | None, replace: bool, offline: bool, as_json: bool
) -> None:
    """Fetch a model from a hub or a web address.

    SOURCE is hf:owner/repo/file.gguf, hf:owner/repo/file.gguf@revision, or an https address. A download that
    was broken off goes on where it stopped when the same command runs again.

    EDGERT_HUB names another hub, EDGERT_OFFLINE=1 is --offline, and HF_TOKEN is sent to the hub for models
    that need an account.
    """
    from edge_runtime.model_store.pull import PullOptions, pull
    from edge_runtime.model_store.store import ModelStore

    options = PullOptions(name=name, sha256=sha256, offline=offline, replace=replace)
    with Bar(f"fetching {source.rpartition('/')[2]}", counts_bytes=True) as bar:
        try:
            model, fetched = pull(ModelStore(), source, options, progress=bar.update, notice=bar.say)
        except KeyboardInterrupt:
            bar.say("stopped; run the same command again to go on from here")
            raise
    size = model.path.stat().st_size
    if as_json:
        facts = {"name": model.name, "path": str(model.path), "sha256": model.sha256, "source": model.source}
        click.echo(json.dumps({**facts, "size": size, "fetched": fetched}))
        return
    click.echo(f"{model.name}: {size_text(size)}, sha256 {model.sha256}")
    if not fetched:
        click.echo("it was in the store already; --replace fetches it again", err=True)
    if sys.stdout.isatty():
        click.secho(f'try it: edgert run --model {model.name} "Hello"', dim=True, err=True)
