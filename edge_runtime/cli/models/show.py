"""``edgert models show``."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import context_text, count_text, mix_text, size_text, table
from edge_runtime.cli.terminal import Bar
from edge_runtime.errors import ModelFileError


@click.command("show")
@click.argument("model", metavar="NAME|PATH")
@click.option("--verify", is_flag=True, help="Hash the file again and compare: finds damage by the disk.")
@json_option
def command(model: str, verify: bool, as_json: bool) -> None:
    """Show what a model is."""
    from edge_runtime.model_store.files import sha256_of
    from edge_runtime.model_store.store import ModelStore
    from edge_runtime.model_store.summary import summarize

    found = ModelStore().resolve(model)
    summary = summarize(found.path)
    sha256 = found.sha256
    if verify or not sha256:
        with Bar("hashing", counts_bytes=True) as bar:
            sha256 = sha256_of(found.path, bar.update)
    if verify and found.sha256 and sha256 != found.sha256:
        raise ModelFileError(
            f"{found.path} has sha256 {sha256}, but was stored with {found.sha256}: the file is damaged; "
            f"fetch it again with `edgert models pull --replace {found.source}`"
        )
    facts: dict[str, Any] = {
        "name": found.name,
        "path": str(found.path),
        "source": found.source,
        "sha256": sha256,
        "added": found.added or None,
        **summary.as_json(),
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    shown = table("", "", header=False)
    for name, value in _rows(facts, verified=verify):
        shown.add_row(name, value)
    shown.print()


def _rows(facts: dict[str, Any], *, verified: bool) -> list[tuple[str, str]]:
    added = time.strftime("%Y-%m-%d", time.localtime(facts["added"])) if facts["added"] else ""
    title = f" ({facts['title']})" if facts["title"] else ""
    source = facts["source"] or "put there by hand"
    return [
        ("name", f"{facts['name']}{title}"),
        ("architecture", facts["architecture"]),
        (
            "parameters",
            f"{count_text(facts['parameters'])} in {facts['layers']} layers of {facts['embedding']}",
        ),
        ("weights", mix_text(facts["quantization"])),
        ("context", f"{context_text(facts['context'])} tokens"),
        ("tokenizer", f"{facts['tokenizer'] or 'unknown'}, {facts['vocabulary']} tokens"),
        ("chat template", "yes" if facts["chat_template"] else "no: it continues text"),
        ("licence", facts["licence"] or "not stated in the file"),
        ("size", size_text(facts["size"])),
        ("sha256", facts["sha256"] + (" (verified)" if verified else "")),
        ("source", f"{source}, added {added}" if added else source),
        ("file", facts["path"]),
    ]
