"""``edgert config show``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from edge_runtime.cli.options import json_option


@click.command("show")
@click.option("--explain", is_flag=True, help="Say what each key means and where its value comes from.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Read this file.")
@json_option
def command(explain: bool, config: Path | None, as_json: bool) -> None:
    """Show the settings that hold.

    The output is a settings file itself: `edgert config show --explain > edgert.toml` makes one to edit.
    """
    from edge_runtime.daemon import config_file

    loaded = config_file.read_settings(config, os.environ, {})
    if as_json:
        rows = config_file.explain(loaded.config, loaded.sources)
        shown = [asdict(row) for row in rows] if explain else {row.key: row.value for row in rows}
        file = None if loaded.file is None else str(loaded.file)
        click.echo(json.dumps({"file": file, "settings": shown}, ensure_ascii=False))
        return
    text = config_file.render_commented(loaded.config, loaded.sources)
    if not explain:
        lines = text.splitlines()
        text = "\n".join(line for line in lines if not line.startswith("#")).strip() + "\n"
    click.echo(text, nl=False)
