"""``edgert config`` and ``edgert completion``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from program import REPOSITORY, Program

from edge_runtime.daemon.config import Config
from edge_runtime.daemon.config_file import SETTINGS, load_config


def test_what_is_shown_is_a_settings_file(edgert: Program, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    for options in ((), ("--explain",)):
        done = edgert("config", "show", *options, environment={"EDGERT_THREADS": ""})
        assert done.code == 0, done.err
        path.write_text(done.out)
        assert load_config(path, {}, {}) == Config()
        assert ("#" in done.out) is bool(options)


def test_explain_has_every_key_and_where_it_comes_from(edgert: Program) -> None:
    done = edgert("config", "show", "--explain", environment={"EDGERT_LOG_LEVEL": "debug"})
    assert all(setting.explanation in done.out for setting in SETTINGS.values())
    assert 'from EDGERT_LOG_LEVEL; default "info"' in done.out
    assert "from EDGERT_THREADS" in done.out


def test_json_has_the_same(edgert: Program) -> None:
    plain = edgert("config", "show", "--json", environment={"EDGERT_THREADS": ""}).json
    assert plain["file"] is None
    assert plain["settings"]["model.default"] == "demo"
    rows = edgert("config", "show", "--json", "--explain").json["settings"]
    assert {row["key"] for row in rows} == set(plain["settings"]) == set(SETTINGS)
    assert next(row for row in rows if row["key"] == "model.threads")["source"] == "EDGERT_THREADS"


def test_faults_are_told_all_at_once_with_exit_code_2(edgert: Program, tmp_path: Path) -> None:
    path = tmp_path / "edgert.toml"
    path.write_text("[server]\nhtp = 1\n[model]\nthreads = 'x'\n")
    done = edgert("config", "show", "--config", path)
    assert done.code == 2
    assert "'server.htp'; the nearest is 'server.http'" in done.err
    assert "model.threads = 'x'" in done.err
    assert edgert("serve", "--config", path).err == done.err


def test_path_is_where_the_file_is_or_would_be(edgert: Program) -> None:
    done = edgert("config", "path")
    assert done.out.strip() == str(edgert.home / "edgert.toml")
    assert "no such file yet" in done.err
    edgert.home.mkdir(parents=True)
    (edgert.home / "edgert.toml").write_text("")
    done = edgert("config", "path")
    assert done.out.strip() == str(edgert.home / "edgert.toml")
    assert done.err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(edgert: Program, shell: str) -> None:
    done = edgert("completion", shell)
    assert done.code == 0
    assert "_EDGERT_COMPLETE" in done.out
    if shutil.which(shell) is None:
        return
    checked = subprocess.run([shell, "-n"], input=done.out, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_completion_in_bash_completes_verbs_and_options(edgert: Program, tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    script = """
source <(printf '%s' "$SCRIPT")
COMP_WORDS=(edgert mod) COMP_CWORD=1
_edgert_completion edgert
printf '%s\\n' "${COMPREPLY[@]}"
COMPREPLY=()
COMP_WORDS=(edgert run --loc) COMP_CWORD=2
_edgert_completion edgert
printf '%s\\n' "${COMPREPLY[@]}"
"""
    program = tmp_path / "edgert"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(edgert.command())} "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = edgert.environment({"SCRIPT": edgert("completion", "bash").out, "PATH": path})
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=True
    )
    assert done.stdout.split() == ["models", "--local"], done.stderr
