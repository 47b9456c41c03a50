"""A download that has begun: the bytes so far, and beside them what they are part of."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from edge_runtime.model_store.files import read_json, write_json

_CHECKPOINT_SECONDS = 2.0


class Partial:
    """``<key>.partial`` and ``<key>.json`` in one folder.

    Only bytes that are known to be on the disk count after a restart: after a power cut a file may have its
    full length and yet hold zeros at its end.

    Args:
        folder: of all downloads that have begun.
        key: names this one; another address has another key.

    Attributes:
        etag: the server's name for this version of the file (empty: it gave none).
        sha256: what the hub says the whole file hashes to (empty: unknown).
        total: size of the whole file in bytes, None where unknown.
        size: bytes here.
    """

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{key}.partial"
        self._sidecar = folder / f"{key}.json"
        self._checkpoint = 0.0
        record = read_json(self._sidecar)
        trusted = _whole(record.get("synced")) or 0
        self.etag = str(record.get("etag") or "")
        self.sha256 = str(record.get("sha256") or "")
        self.total = _whole(record.get("total"))
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self.size = min(trusted, os.fstat(self._file.fileno()).st_size)
        self._file.truncate(self.size)
        self._file.seek(self.size)

    def restart(self) -> None:
        """Drop every byte: they are of another version of the file."""
        self._file.truncate(0)
        self._file.seek(0)
        self.size, self.total, self.etag, self.sha256 = 0, None, "", ""

    def append(self, chunk: bytes) -> None:
        """Write bytes at the end.

        Raises:
            OSError: the disk is full or fails.
        """
        self._file.write(chunk)
        self.size += len(chunk)
        if time.monotonic() - self._checkpoint > _CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Bring bytes, then the record of them, to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        record = {"etag": self.etag, "sha256": self.sha256, "total": self.total, "synced": self.size}
        write_json(self._sidecar, record)
        self._checkpoint = time.monotonic()

    def close(self) -> None:
        """Keep what is here for the next time; nothing leaves nothing."""
        if self.size == 0:
            self.discard()
        elif not self._file.closed:
            try:
                self.save()
            finally:
                self._file.close()

    def discard(self) -> None:
        """Remove both files."""
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def hand_over(self) -> Path:
        """Sync, close, and give the file to the caller, who moves it away."""
        self.close()
        self._sidecar.unlink(missing_ok=True)
        return self.path


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
