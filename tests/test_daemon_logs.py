"""What the daemon's log looks like, and what a stranger's text can do to it."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.daemon import logs
from edge_runtime.daemon.config import LogConfig
from edge_runtime.errors import ConfigError

HOSTILE = "x\n2026-01-01T00:00:00.000Z error  forged\r\x1b[2J\x07\x85\u2028\u202e\x7f\U000e0001\ud800"


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    yield
    logs.remove()


@pytest.fixture
def log() -> logging.Logger:
    return logging.getLogger("edgert.test")


def to_file(folder: Path, **settings: Any) -> Path:
    path = folder / "log" / "edgert.log"
    logs.configure(LogConfig(file=str(path), **settings))
    return path


def test_a_human_line(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path)
    log.info("request finished", extra={"id": "r1", "tokens": 80, "seconds": 1.23456789, "client": "a b"})
    (line,) = path.read_text().splitlines()
    time, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == 'info    request finished id=r1 tokens=80 seconds=1.234568 client="a b"'


def test_a_json_line(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path, format="json")
    extra = {"id": "r1", "none": None, "list": [1, {"a": Path("/x")}], "nan": float("nan"), "level": "mine"}
    log.warning("queue is %s", "full", extra=extra)
    found = json.loads(path.read_text())
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "event": "queue is full",
        "logger": "edgert.test",
        "id": "r1",
        "none": None,
        "list": [1, {"a": "/x"}],
        "nan": "nan",
        "level_": "mine",
    }


@pytest.mark.parametrize("form", ["human", "json"])
def test_what_is_logged_cannot_forge_a_line(tmp_path: Path, log: logging.Logger, form: str) -> None:
    path = to_file(tmp_path, format=form)
    log.info("event %s", HOSTILE, extra={"client": HOSTILE, HOSTILE: 1})
    (line,) = path.read_bytes().split(b"\n")[:-1]
    assert line.decode().isprintable()
    assert "\\u202e" in line.decode()
    if form == "json":
        assert json.loads(line)["client"] == HOSTILE


@given(
    value=st.text(), key=st.text(min_size=1).filter(lambda key: key not in vars(logging.makeLogRecord({})))
)
def test_any_text_is_one_line(value: str, key: str) -> None:
    record = logging.makeLogRecord(
        {"msg": value, "levelname": "INFO", "levelno": 20, "name": "n", key: value}
    )
    assert logs.Lines(as_json=False, journal=False).format(record).isprintable()
    line = logs.Lines(as_json=True, journal=False).format(record)
    assert line.isprintable()
    assert json.loads(line)["event"] == value


def test_an_exception_is_one_field_of_json(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path, format="json")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("it failed")
    (line,) = path.read_text().splitlines()
    found = json.loads(line)
    assert found["event"] == "it failed"
    assert found["exception"].startswith("Traceback")
    assert "ValueError" in found["exception"]


def test_an_exception_is_indented_for_people(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path)
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z error  forged")
    except ValueError:
        log.exception("it failed")
    first, *rest = path.read_text().splitlines()
    assert first.endswith("it failed")
    assert len(rest) > 3
    assert all(line.startswith("    ") for line in rest)


def test_the_level_holds_for_ours_and_warnings_of_others_are_kept(
    tmp_path: Path, log: logging.Logger
) -> None:
    path = to_file(tmp_path, level="info")
    log.debug("too small")
    logging.getLogger("edge_runtime.daemon.auth").info("ours as well")
    logging.getLogger("uvicorn.access").info("too small")
    logging.getLogger("asyncio").error("of others")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of Python", UserWarning, stacklevel=1)
    text = path.read_text()
    assert "too small" not in text
    assert [word in text for word in ("ours as well", "of others", "of Python")] == [True] * 3


def test_arguments_that_do_not_fit_do_not_lose_the_event(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path)
    log.info("%d tokens", "many")
    assert "%d tokens" in path.read_text()


def test_long_values_are_cut(tmp_path: Path, log: logging.Logger) -> None:
    path = to_file(tmp_path, format="json")
    log.info("x" * 100_000, extra={"client": "y" * 100_000, "many": list(range(10_000))})
    assert len(path.read_text()) < 10_000


def test_the_file_is_private_and_rotated(
    tmp_path: Path, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    path = tmp_path / "log" / "edgert.log"
    path.parent.mkdir()
    path.write_text("from before\n")
    path.chmod(0o666)
    to_file(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number in range(500):
        log.info("event", extra={"number": number})
    files = sorted(path.parent.iterdir())
    assert len(files) == logs.FILES
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_size <= 2000
    assert "number=499" in path.read_text()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(ConfigError, match=r"log\.file"):
        to_file(tmp_path)


def test_a_second_configuration_replaces_the_first(tmp_path: Path, log: logging.Logger) -> None:
    first = to_file(tmp_path / "1")
    second = to_file(tmp_path / "2")
    log.info("event")
    assert first.read_text() == ""
    assert second.read_text().count("event") == 1


PROGRAM = """
import logging, os, sys
from edge_runtime.daemon import logs
from edge_runtime.daemon.config import LogConfig
found = os.fstat(2)
journal = {"own": f"{found.st_dev}:{found.st_ino}", "other": "1:1", "none": None}[sys.argv[1]]
if journal:
    os.environ["JOURNAL_STREAM"] = journal
logs.configure(LogConfig(format=sys.argv[2]))
logging.getLogger("edgert").warning("event")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("edgert").exception("it failed")
"""


def stderr_of(*arguments: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "JOURNAL_STREAM"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        check=True,
        env=environment,
        text=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_the_journal_gets_priorities_and_no_times() -> None:
    first, second, *rest = stderr_of("own", "human")
    assert first == "<4>warning event"
    assert second == "<3>error   it failed"
    assert rest
    assert all(line.startswith("<3>    ") for line in rest)


def test_the_journal_gets_json_too() -> None:
    first, second = stderr_of("own", "json")
    assert json.loads(first.removeprefix("<4>")) == {"level": "warning", "event": "event", "logger": "edgert"}
    assert "ZeroDivisionError" in json.loads(second.removeprefix("<3>"))["exception"]


@pytest.mark.parametrize("journal", ["other", "none"])
def test_elsewhere_times_are_written(journal: str) -> None:
    assert stderr_of(journal, "human")[0].startswith("20")
