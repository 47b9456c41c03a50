"""The program's top level: its verbs, and what becomes of errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from edge_runtime import __version__
from edge_runtime.cli.lazy import LazyGroup
from edge_runtime.errors import EdgeRuntimeError, OutOfMemoryError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PROGRAM = "edgert"
# From click 8.2 on; before, click itself shows the help.
_NO_ARGUMENTS: type[click.UsageError] | tuple[()] = getattr(click.exceptions, "NoArgsIsHelpError", ())

_EPILOG = """\b
Examples:
  edgert run "Where does a computer keep its facts?"
  edgert chat
  edgert models pull hf:owner/repository/model-q4_0.gguf
  edgert run --model model-q4_0 --temperature 0 - < question.txt
  edgert serve

Start with `edgert doctor` if something is slow or fails.
"""


@click.group(
    PROGRAM,
    cls=LazyGroup,
    verbs={
        "run": ("edge_runtime.cli.run", "Answer one prompt."),
        "chat": ("edge_runtime.cli.chat", "Talk with a model."),
        "edit": ("edge_runtime.cli.edit", "Change a fact that a model knows."),
        "forget": ("edge_runtime.cli.forget", "Let a model refuse queries."),
        "edits": ("edge_runtime.cli.edits", "List, test, undo and exchange what models were taught."),
        "models": ("edge_runtime.cli.models", "List, fetch and remove models."),
        "serve": ("edge_runtime.cli.serve", "Answer requests over HTTP and gRPC."),
        "ps": ("edge_runtime.cli.ps", "Show what the daemon is doing."),
        "stop": ("edge_runtime.cli.stop", "Let the daemon finish and end."),
        "logs": ("edge_runtime.cli.logs", "Show the daemon's log."),
        "init": ("edge_runtime.cli.init", "Make what the daemon needs to be reached from other devices."),
        "token": (
            "edge_runtime.cli.token",
            "Make, list and revoke the tokens with which programs use the daemon.",
        ),
        "config": ("edge_runtime.cli.config", "Show the daemon's settings."),
        "cluster": ("edge_runtime.cli.cluster", "Let several devices answer together."),
        "calibrate": (
            "edge_runtime.cli.calibrate",
            "Measure what a model loses when other devices answer late.",
        ),
        "bench": ("edge_runtime.cli.bench", "Measure speed and memory on this device."),
        "doctor": ("edge_runtime.cli.doctor", "Check this device and say what to do about each fault."),
        "completion": (
            "edge_runtime.cli.completion",
            "Print the script that completes commands and options in a shell.",
        ),
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def group() -> None:
    """Language models on small computers.

    Without --model, commands use the demo model that comes with the program.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit.

    Exit codes are those of :mod:`edge_runtime.errors`; 2 also for a wrong command line, 130 when interrupted.
    """
    # numpy's products are small here; its threads would wait for each other while the kernels' compute.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = "--json" in options
    try:
        result = group.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except EdgeRuntimeError as error:
        return _report(error, as_json)
    except click.Abort as abort:
        interrupted = isinstance(abort.__cause__, KeyboardInterrupt)
        return _fail("interrupted", "interrupted" if interrupted else "stopped", INTERRUPTED, as_json)
    except click.UsageError as error:
        if isinstance(error, _NO_ARGUMENTS):
            click.echo(error.format_message(), err=True)  # the help itself
            return error.exit_code
        code = _fail("usage", error.format_message(), error.exit_code, as_json)
        if error.ctx is not None:
            click.echo(f"{error.ctx.command_path} --help shows what there is", err=True)
        return code
    except click.ClickException as error:
        return _fail("usage", error.format_message(), error.exit_code, as_json)
    except MemoryError:
        return _report(OutOfMemoryError("no memory left; choose a smaller model or context"), as_json)
    except OSError as error:
        _trace()
        where = f" ({error.filename})" if error.filename else ""
        return _fail("system", f"{error.strerror or error}{where}", 1, as_json)
    except Exception as error:  # a defect of the program: short for users, whole with EDGERT_DEBUG
        _trace()
        text = f"{type(error).__name__}: {error}; this is a defect, EDGERT_DEBUG=1 shows where"
        return _fail("internal", text, 1, as_json)
    return result if isinstance(result, int) else 0


def _report(error: EdgeRuntimeError, as_json: bool) -> int:
    _trace()
    return _fail(error.code, str(error), error.exit_code, as_json)


def _trace() -> None:
    if os.environ.get("EDGERT_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()


def _fail(code: str, message: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"error": {"code": code, "message": message, "exit_code": exit_code}}))
    label = click.style("error:", fg="red", bold=True)
    click.echo(message if code == "interrupted" else f"{label} {message}", err=True)
    return exit_code
