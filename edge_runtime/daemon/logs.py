"""What the daemon writes down: one line an event, for people or for programs.

Use it with ``logging.getLogger(__name__)``; the message names the event and never changes, what
differs goes into ``extra``::

    log.info("request finished", extra={"id": answer.id, "tokens": 80, "seconds": 1.2})

Values may come from strangers (a client's name, a model's name): whatever could break a line, or command the
terminal that shows it, is escaped. Prompts and answers are never handed over in the first place.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from edge_runtime.daemon.config import LogConfig
from edge_runtime.errors import ConfigError

LOGGERS = ("edgert", "edge_runtime")  # whose level is the one set; others write warnings and errors
FILE_BYTES = 2_000_000
FILES = 5  # the one being written and four before it
_LONGEST_VALUE = 4_000  # characters
_LONGEST_TRACE = 20_000
_PRIORITIES = {  # of syslog; journald takes it from the head of a line
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(config: LogConfig) -> None:
    """Send the daemon's log where the settings say; a second call replaces the first.

    Other libraries' warnings and errors take the same way, Python's own warnings too.

    Raises:
        ConfigError: the log file cannot be opened.
    """
    handler = _handler(config)
    root = logging.getLogger()
    remove()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(config.level.upper())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk or a closed pipe must not end in a second traceback


def remove() -> None:
    """Undo :func:`configure`, closing the file."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler.formatter, Lines):
            root.removeHandler(handler)
            handler.close()
            root.setLevel(logging.WARNING)
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.NOTSET)
            logging.captureWarnings(False)
            logging.raiseExceptions = True


def to_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether a stream ends in systemd's journal, which adds the time itself.

    The variable alone says little: a terminal that a user's service started passes it on to everything.
    """
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class Lines(logging.Formatter):
    """One line an event.

    Args:
        as_json: an object a line; else text.
        journal: begin with syslog's priority in place of the time.
    """

    def __init__(self, *, as_json: bool, journal: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        try:
            event = record.getMessage()
        except (
            TypeError,
            ValueError,
        ):  # arguments that do not fit: a defect, but no reason to lose the event
            event = str(record.msg)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        time = time.replace("+00:00", "Z")
        line = self._json(time, event, record) if self._as_json else self._human(time, event, record)
        if not self._journal:
            return line
        mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(mark + part for part in line.split("\n"))

    def _json(self, time: str, event: str, record: logging.LogRecord) -> str:
        written: dict[str, Any] = {} if self._journal else {"time": time}
        written |= {"level": record.levelname.lower(), "event": _short(event), "logger": record.name}
        for key, value in _extras(record):
            written[f"{key}_" if key in written or key == "exception" else key] = _plain(value)
        trace = _trace(record)
        if trace:
            written["exception"] = trace
        return _escaped(json.dumps(written, ensure_ascii=False, allow_nan=False))

    def _human(self, time: str, event: str, record: logging.LogRecord) -> str:
        words = [] if self._journal else [time]
        words += [f"{record.levelname.lower():7}", _escaped(_short(event))]
        words += [f"{_escaped(key)}={_word(value)}" for key, value in _extras(record)]
        trace = _trace(record)
        lines = [" ".join(words), *(f"    {_escaped(line)}" for line in trace.splitlines())]
        return "\n".join(lines)


def _extras(record: logging.LogRecord) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in vars(record).items() if key not in _OWN]


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    text = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
    return text if len(text) <= _LONGEST_TRACE else f"...{text[-_LONGEST_TRACE:]}"


def _plain(value: Any) -> Any:
    """What JSON can hold; texts are cut, objects become texts."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return round(value, 6) if abs(value) < float("inf") else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in list(value.items())[:100]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in list(value)[:100]]
    return _short(str(value))


def _word(value: Any) -> str:
    """A value of the human format: quoted where its end would not be seen."""
    plain = _plain(value)
    if isinstance(plain, str):
        bare = plain and plain.isprintable() and not any(character in ' ="\\' for character in plain)
        return plain if bare else _escaped(json.dumps(plain, ensure_ascii=False))
    return _escaped(json.dumps(plain, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _escaped(text: str) -> str:
    """Without characters that end a line, move the cursor or turn the direction of writing."""
    return text if text.isprintable() else "".join(map(_escaped_character, text))


def _escaped_character(character: str) -> str:
    if character.isprintable():
        return character
    units = character.encode("utf-16-be", "surrogatepass")  # as JSON writes what lies beyond 16 bits
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


class _PrivateRotatingFile(RotatingFileHandler):
    """A rotated file that only its owner reads."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # it may have been there before
        except OSError:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _handler(config: LogConfig) -> logging.Handler:
    as_json = config.format == "json"
    handler: logging.Handler
    if config.file:
        path = Path(config.file)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handler = _PrivateRotatingFile(path, maxBytes=FILE_BYTES, backupCount=FILES - 1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"log.file = {config.file!r}: {error.strerror}; choose a file this user can write, or leave "
                "it empty for standard error"
            ) from error
        handler.setFormatter(Lines(as_json=as_json, journal=False))
        return handler
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(as_json=as_json, journal=to_journal(sys.stderr, os.environ)))
    return handler
