"""What lies in deploy/: an installer that leaves the system alone here, a unit, and monitoring files."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import REPOSITORY

from edge_runtime.daemon.config_file import load_config
from edge_runtime.daemon.metrics import Metrics
from edge_runtime.daemon.requests import Usage
from edge_runtime.daemon.status import LoadedModel, Status

DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "edgert.service"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the service is Linux's")


def install(*options: str | Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", DEPLOY / "install.sh", *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        umask=umask,
    )


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_a_dry_run_says_all_and_does_nothing(tmp_path: Path) -> None:
    done = install("--dry-run", "--destdir", tmp_path / "root")
    assert done.returncode == 0, done.stderr
    for word in ("/opt/edgert", "prepare.sh", "edgert.toml", "edgert.service", "/usr/local/bin/edgert"):
        assert word in done.stdout
    assert not (tmp_path / "root").exists()


def test_a_dry_run_on_the_system_needs_no_rights_and_touches_nothing(tmp_path: Path) -> None:
    before = os.path.exists("/opt/edgert"), os.path.exists("/etc/edgert")  # noqa: PTH110
    done = install("--dry-run", "--no-venv")
    assert done.returncode == 0, done.stderr
    assert "useradd" in done.stdout or "user edgert is there" in done.stdout
    assert (os.path.exists("/opt/edgert"), os.path.exists("/etc/edgert")) == before  # noqa: PTH110


def test_files_are_placed_and_placing_them_again_changes_nothing(tmp_path: Path) -> None:
    options = ("--no-venv", "--destdir", tmp_path)
    assert install(*options, umask=0o077).returncode == 0
    unit = tmp_path / "etc/systemd/system/edgert.service"
    assert "ExecStart=/opt/edgert/bin/edgert serve\n" in unit.read_text()
    assert "@" not in re.sub(r"^SystemCallFilter=.*$", "", unit.read_text(), flags=re.MULTILINE)
    settings = tmp_path / "etc/edgert/edgert.toml"
    for path, mode in (
        (unit, 0o644),
        (settings, 0o644),
        (tmp_path / "var/lib/edgert", 0o755),
        (tmp_path / "opt", 0o755),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    settings.write_text("[log]\nlevel = 'debug'\n")
    first = tree(tmp_path)
    assert install(*options).returncode == 0
    assert tree(tmp_path) == first
    assert load_config(settings, {}, {}).log.level == "debug"


def test_another_prefix_is_in_the_unit(tmp_path: Path) -> None:
    done = install("--no-venv", "--destdir", tmp_path, "--prefix", "/srv/tools/edgert/")
    assert done.returncode == 0, done.stderr
    assert (
        "/srv/tools/edgert/bin/edgert serve" in (tmp_path / "etc/systemd/system/edgert.service").read_text()
    )


def test_uninstall_keeps_data_and_purge_does_not(tmp_path: Path) -> None:
    assert install("--no-venv", "--destdir", tmp_path).returncode == 0
    model = tmp_path / "var/lib/edgert/models/own.gguf"
    model.parent.mkdir()
    model.write_text("weights")
    done = install("--uninstall", "--destdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--purge" in done.stdout
    assert not (tmp_path / "etc/systemd/system/edgert.service").exists()
    assert model.exists()
    assert (tmp_path / "etc/edgert/edgert.toml").exists()
    for _ in range(2):  # twice: nothing left to remove is no error
        assert install("--uninstall", "--purge", "--destdir", tmp_path).returncode == 0
        assert tree(tmp_path) == {}


def test_an_update_after_an_uninstall_finds_its_settings(tmp_path: Path) -> None:
    install("--no-venv", "--destdir", tmp_path)
    (tmp_path / "etc/edgert/edgert.toml").write_text("# mine\n")
    install("--uninstall", "--destdir", tmp_path)
    install("--no-venv", "--destdir", tmp_path)
    assert (tmp_path / "etc/edgert/edgert.toml").read_text() == "# mine\n"


def test_what_it_did_not_make_it_neither_takes_over_nor_removes(tmp_path: Path) -> None:
    theirs = tmp_path / "opt/edgert/theirs"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("")
    done = install("--destdir", tmp_path)
    assert done.returncode == 1
    assert "not made by this script" in done.stderr
    install("--uninstall", "--purge", "--destdir", tmp_path)
    assert theirs.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--prefix", "/"), "folder of its own"),
        (("--prefix", "/opt"), "folder of its own"),
        (("--prefix", "relative/folder"), "folder of its own"),
        (("--prefix", "/opt/with space"), "space"),
        (("--prefix",), "needs a value"),
        (("--destdir", "relative"), "absolute"),
        (("--from", "/nowhere"), "no such file"),
        (("--from", "/tmp"), "neither a wheel nor a checkout"),
        (("--purge",), "--uninstall"),
        (("--fast",), "unknown option"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], complaint: str) -> None:
    done = install("--dry-run", *options)
    assert done.returncode == 1
    assert complaint in done.stderr


def test_a_missing_python_is_named() -> None:
    environment = {**os.environ, "PYTHON": "python3.999"}
    done = subprocess.run(
        ["bash", DEPLOY / "install.sh", "--dry-run"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "missing: python3.999" in done.stderr


def test_a_python_that_the_service_cannot_see_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /home/somebody/python3.12\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", DEPLOY / "install.sh", "--dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python)},
        check=False,
    )
    assert done.returncode == 1
    assert "/home/somebody/python3.12, where the service cannot read it" in done.stderr


def test_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", *map(str, DEPLOY.glob("*.sh"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_unit_passes_systemds_own_check(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "edgert.service"
    program = tmp_path / "bin/edgert"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit.write_text(UNIT.read_text().replace("@prefix@", str(tmp_path)))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "edgert.service" not in done.stderr, done.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" not in rated.stderr:  # systemd before 250
        assert rated.returncode == 0, rated.stdout[-2000:]


def test_no_page_is_written_and_executed(demo_model: Path) -> None:
    """What MemoryDenyWriteExecute forbids, through the kernel's own switch (Linux 6.3 and newer)."""
    program = (
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0: sys.exit(99)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'edge_runtime.cli', 'run', '--local', '-t', '1',"
        " '-n', '4', 'Hello'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    if done.returncode == 99:
        pytest.skip("this kernel cannot forbid it for one process")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def metric_names() -> set[str]:
    """Everything the daemon's metrics page has when nothing is left out."""
    metrics = Metrics()
    metrics.tokens(3)
    metrics.finished("stop", Usage("stop", 1, 5, 2, 3, 0.1, 0.2, 0.3))
    model = LoadedModel("demo", 1, "Q8_0", 512, 4, 1, 1, 1)
    status = Status(
        version="1",
        pid=1,
        started=0.0,
        ready=True,
        reason="",
        stopping=False,
        default_model="demo",
        models=(model,),
        requests=(),
        queue_limit=1,
        finished={},
        prompt_tokens=0,
        generated_tokens=0,
        speed=(),
        memory_bytes=1,
        memory_available_bytes=1,
        temperature=40.0,
        cpu_percent=1.0,
    )
    page = metrics.render(status)[0].decode()
    return {re.split(r"[{ ]", line)[0] for line in page.splitlines() if not line.startswith("#")}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bedgert_[a-z_]+\b", text))


def test_the_dashboard_shows_what_there_is() -> None:
    board: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    assert board["uid"] == "edgert"
    used = names_in(" ".join(target["expr"] for panel in board["panels"] for target in panel["targets"]))
    assert len(used) > 15
    assert used <= metric_names()
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_alerts_watch_what_there_is() -> None:
    yaml = pytest.importorskip("yaml")
    alerts = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert set(rule["annotations"]) == {"summary", "action"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert names_in(rule["expr"]) <= metric_names()
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["job_name"] == "edgert"
    assert scrape["rule_files"] == ["alerts.yml"]


def test_the_container_copies_what_there_is() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE)
    assert copied
    for words in copied:
        for word in words.split():
            assert (REPOSITORY / word).exists(), word
    assert "USER edgert" in text
    assert "HEALTHCHECK" in text
