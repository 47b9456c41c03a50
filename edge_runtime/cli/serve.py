"""``edgert serve``: the daemon, in the foreground."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edge_runtime.daemon.config import Config
    from edge_runtime.daemon.runtime_file import RunningDaemon


@click.command("serve")
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="Read this file.")
@click.option("--http", metavar="ADDR", help="HOST:PORT of the HTTP API and the status page; '': none.")
@click.option("--grpc", metavar="ADDR", help="HOST:PORT of the gRPC API; '': none.")
@click.option("-m", "--model", metavar="NAME|PATH", help="Answers requests that name no model.")
@click.option("-t", "--threads", type=int, metavar="N", help="CPU threads; 0: as many as suit the model.")
@click.option("-c", "--context", type=int, metavar="TOKENS", help="Room for prompt and answer of a request.")
@click.option("--sequences", type=int, metavar="N", help="Requests computed together.")
@click.option("--log-format", type=click.Choice(["human", "json"]), help="Lines for people or for programs.")
@click.option("--log-file", metavar="FILE", help="Write the log there, not to standard error.")
def command(
    file: Path | None,
    http: str | None,
    grpc: str | None,
    model: str | None,
    threads: int | None,
    context: int | None,
    sequences: int | None,
    log_format: str | None,
    log_file: str | None,
) -> None:
    """Answer requests over HTTP and gRPC.

    It stays in the foreground until it is stopped. Ctrl-C, SIGTERM and `edgert stop` let running requests
    finish, a second Ctrl-C does not. SIGHUP reads tokens and certificates anew. Options stand above the
    environment, and that above the settings file: `edgert config show --explain`.
    """
    from edge_runtime.daemon.config_file import load_config
    from edge_runtime.model_store.paths import home

    overrides = {
        "server.http": http,
        "server.grpc": grpc,
        "model.default": model,
        "model.threads": threads,
        "model.context": context,
        "model.sequences": sequences,
        "log.format": log_format,
        "log.file": log_file,
    }
    config = load_config(file, os.environ, overrides)
    from edge_runtime.daemon.certificates import check_exposure, token_required

    check_exposure(config, home())
    token = home() / "token" if token_required(config) else None
    from edge_runtime.daemon import main

    main.run(config, home(), on_ready=lambda running: announce(running, config, token))


def announce(running: RunningDaemon, config: Config, token: Path | None) -> None:
    """Say on standard error, once it listens, what answers where and how to try it.

    Not where programs read that stream: the journal, and a log of JSON lines.

    Args:
        token: file of the token that callers need; None where they need none.
    """
    from edge_runtime.daemon.logs import to_journal

    log_is_here = not config.log.file
    if to_journal(sys.stderr, os.environ) or (log_is_here and config.log.format == "json"):
        return
    rows = [("model", config.model.default)]
    if running.url:
        rows.append(("page", f"{running.url}/"))
        if _everywhere(running.http):
            port = running.http.rpartition(":")[2]
            rows.append(("elsewhere", f"{running.url.partition(':')[0]}://{socket.gethostname()}:{port}/"))
        rows.append(("OpenAI API", f"{running.url}/v1"))
    if running.grpc:
        rows.append(("gRPC", running.grpc_target))
    if running.url:
        rows.append(("try", curl_line(running, config.model.default, token)))
    else:
        rows.append(("try", "edgert run 'Hello'"))
    rows.append(("log", config.log.file or "below"))
    rows.append(("stop", "Ctrl-C, or: edgert stop"))
    width = max(len(title) for title, _ in rows)
    click.secho(f"edgert {running.version} is ready", bold=True, err=True)
    for title, text in rows:
        click.echo(f"  {click.style(f'{title:{width}}', dim=True)}  {text}", err=True)


def curl_line(running: RunningDaemon, model: str, token: Path | None) -> str:
    """A command that asks the daemon something, to be pasted into a shell of the same user."""
    import json
    import shlex

    body: dict[str, Any] = {"model": model, "stream": True}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    words = ["curl", "-N"]
    if running.tls and running.ca:
        words += ["--cacert", shlex.quote(running.ca)]
    words += [f"{running.url}/v1/chat/completions", "-H", "'content-type: application/json'"]
    if token is not None:
        words += ["-H", f'"authorization: Bearer $(cat {shlex.quote(str(token))})"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body))])


def _everywhere(address: str) -> bool:
    return address.rpartition(":")[0] in ("0.0.0.0", "[::]")
