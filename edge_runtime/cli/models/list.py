"""``edgert models list``."""

from __future__ import annotations

import json
from typing import Any

import click

from edge_runtime.cli.options import json_option
from edge_runtime.cli.present import context_text, count_text, mix_text, size_text, table
from edge_runtime.errors import ModelFileError


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List the models on this device."""
    from edge_runtime.model_store.store import ModelStore
    from edge_runtime.model_store.summary import summarize

    store = ModelStore()
    rows: list[dict[str, Any]] = []
    for model in store:
        row: dict[str, Any] = {"name": model.name, "path": str(model.path), "source": model.source}
        try:
            row |= summarize(model.path).as_json()
        except ModelFileError as error:
            row |= {"size": model.path.stat().st_size, "error": str(error)}
        rows.append(row)
    if as_json:
        click.echo(json.dumps({"store": str(store.models), "models": rows}, ensure_ascii=False))
        return
    if not rows:
        click.echo("no models; `edgert models pull hf:owner/repo/file.gguf` fetches one")
        return
    shown = table("NAME", "ARCHITECTURE", "PARAMETERS", "WEIGHTS", "CONTEXT", "SIZE", "SOURCE")
    for row in rows:
        what = ["damaged: `edgert models show` says how", "", "", ""]
        if "error" not in row:
            what = [
                row["architecture"],
                count_text(row["parameters"]),
                mix_text(row["quantization"], most=1),
                context_text(row["context"]),
            ]
        shown.add_row(row["name"], *what, size_text(row["size"]), row["source"] or "put there by hand")
    shown.print()
