"""Files that are either wholly there or not there, and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 1 << 20

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None where unknown)."""


def no_progress(done: int, total: int | None) -> None:
    """A :data:`Progress` that shows nothing."""


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(path: Path, target: Path) -> None:
    """Rename within one file system, durably. ``path`` must be synced already."""
    path.replace(target)
    sync_folder(target.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    move_into_place(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sha256_of(path: Path, progress: Progress = no_progress) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    feed(digest, path, progress)
    return digest.hexdigest()


def feed(digest: Any, path: Path, progress: Progress = no_progress) -> None:
    """Pass a file's bytes through a hashlib object."""
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
