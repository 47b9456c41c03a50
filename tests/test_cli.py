"""The program as a whole: help, versions, errors, and what it costs to start."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from program import Program

from edge_runtime import __version__
from edge_runtime.cli.lazy import LazyGroup
from edge_runtime.cli.program import group

HEAVY = (
    "numpy",
    "rich",
    "jinja2",
    "psutil",
    "llama_cpp",
    "ctypes",
    "urllib.request",
    "platformdirs",
    "torch",
)


def commands(command: click.Command = group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from commands(child, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_of_every_command_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        "from edge_runtime.cli.program import main\n"
        f"try: main({[*path, '--help']!r})\n"
        "except SystemExit as end: code = end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('CODE', code, 'HEAVY', *found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "CODE 0 HEAVY"
    assert done.stdout.startswith(f"Usage: {' '.join(('edgert', *path))}")


def test_list_of_verbs_imports_no_verb() -> None:
    code = (
        "import sys\n"
        "from edge_runtime.cli.program import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted(name for name in sys.modules if name.startswith('edge_runtime.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "edge_runtime.cli.lazy edge_runtime.cli.program"


def lazy_groups() -> list[LazyGroup]:
    found = []
    for path in commands():
        command: click.Command | None = group
        for name in path:
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), name)
        if isinstance(command, LazyGroup):
            found.append(command)
    return found


def test_lists_of_verbs_say_what_the_verbs_say_themselves() -> None:
    for lazy in lazy_groups():
        for name, (module, description) in lazy.verbs.items():
            command = importlib.import_module(module).command
            assert command.name == name
            assert command.get_short_help_str(limit=200).rstrip(".") == description.rstrip(".")


def test_defaults_are_the_engine_s_own() -> None:
    from edge_runtime.cli.options import SAMPLING_DEFAULTS
    from edge_runtime.engine.sampling import SamplingParameters

    defaults = SamplingParameters()
    assert {name: getattr(defaults, name) for name in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS


def test_version(edgert: Program) -> None:
    assert edgert("--version").out == f"edgert {__version__}\n"


def test_unknown_command_points_to_the_help(edgert: Program) -> None:
    done = edgert("walk")
    assert done.code == 2
    assert done.out == ""
    assert "error: No such command 'walk'" in done.err
    assert "edgert --help" in done.err


def test_a_command_without_its_verb_shows_the_verbs(edgert: Program) -> None:
    done = edgert("cluster")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: edgert cluster")
    assert "\n  invite " in done.err


def test_unknown_option_points_to_the_command_s_help(edgert: Program) -> None:
    done = edgert("models", "list", "--wide")
    assert done.code == 2
    assert "edgert models list --help" in done.err


def test_error_is_one_line_with_its_exit_code(edgert: Program) -> None:
    done = edgert("run", "--model", "absent", "Hello")
    assert done.code == 4
    assert done.out == ""
    assert done.err.startswith("error: no model named 'absent'")
    assert done.err.count("\n") == 1


def test_error_is_a_json_object_where_json_was_asked_for(edgert: Program) -> None:
    done = edgert("models", "show", "absent", "--json")
    assert done.code == 4
    assert done.json["error"]["code"] == "model_not_found"
    assert done.json["error"]["exit_code"] == 4
    assert "absent" in done.json["error"]["message"]


def test_wrong_command_line_is_a_json_object_too(edgert: Program) -> None:
    done = edgert("run", "--json", "--temperature", "hot", "Hello")
    assert done.code == 2
    assert done.json["error"]["code"] == "usage"


def test_prompt_after_two_dashes_is_no_option(edgert: Program) -> None:
    done = edgert("run", "--model", "absent", "--", "--json")
    assert done.code == 4
    assert done.out == ""


def test_debug_variable_shows_the_trace(edgert: Program) -> None:
    done = edgert("models", "show", "absent", environment={"EDGERT_DEBUG": "1"})
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: no model named")


def test_fault_of_the_system_is_no_trace(edgert: Program, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    done = edgert("models", "pull", "http://127.0.0.1:9/m.gguf", environment={"EDGERT_HOME": str(blocked)})
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.startswith("error: ")


def test_program_that_was_installed_is_the_same(edgert: Program) -> None:
    script = Path(sys.executable).with_name("edgert")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"edgert {__version__}\n"
