"""Shards on this device's disk, each in a file named by its SHA-256.

::

    <folder>/shards/ab/abcd...   whole shards; the time of change is that of the last use
    <folder>/arriving/abcd...    shards of which a part has arrived
    <folder>/claims/*.claim      what each process needs now; valid while the process lives
    <folder>/cache.lock          held while claims, or the room for them, change

A shard gets its name by one rename, after its bytes were checked and are on the disk. So whatever is killed
at whatever moment, a shard is there as a whole, or in part under another name, or not at all. Several
processes may use one folder. What is claimed is never removed, and the room for what is claimed but has not
arrived is kept free; of the rest the least recently used goes first when room is needed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from struct import Struct
from tempfile import mkstemp
from types import TracebackType
from typing import NamedTuple, Self

from edge_runtime.errors import DownloadError
from edge_runtime.model_store.files import CHUNK, exclusive
from edge_runtime.model_store.paths import home

DEFAULT_LIMIT_BYTES = 16 << 30
_DISK_MARGIN = 64 << 20  # left free, so that the rest of the system goes on working
_POLL_SECONDS = 0.1  # while another process fetches the same shard
_MAX_VERIFIED = 1 << 17  # digests remembered as checked since this process began
_NAME = re.compile(r"[0-9a-f]{64}")
_CLAIMED = Struct("<32sQ")

Sized = tuple[bytes, int]
"""Digest and size. Both, since a size comes from a manifest, which may lie."""


def default_folder() -> Path:
    """Where this device keeps shards."""
    return home() / "shard-cache"


class _Entry(NamedTuple):
    used_ns: int
    size: int
    digest: bytes
    path: Path


class Claim:
    """Shards that stay, and room for those still to come, until it is closed. A context manager."""

    def __init__(self, cache: ShardCache, shards: frozenset[Sized]) -> None:
        self._cache = cache
        self._shards = shards

    def close(self) -> None:
        """Give them up; safe to call twice."""
        shards, self._shards = self._shards, frozenset()
        self._cache._release(shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Arriving:
    """The part of one shard that has arrived, held by one thread of one process. A context manager.

    Attributes:
        size: bytes here; the next ones wanted start there.
        resumed: bytes of these that an earlier try has left.
    """

    def __init__(self, cache: ShardCache, file: FileIO, path: Path, digest: bytes, total: int) -> None:
        self._cache, self._file, self._path = cache, file, path
        self._digest, self._total = digest, total
        self._hash = hashlib.sha256()
        self.size = 0
        if os.fstat(file.fileno()).st_size > total:
            file.truncate(0)
        while chunk := file.read(CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)
        self.resumed = self.size

    def write(self, chunk: bytes) -> None:
        """Put bytes at the end.

        Raises:
            DownloadError: the disk is full or fails, or the shard would become longer than it is.
        """
        if self.size + len(chunk) > self._total:
            raise DownloadError(f"shard {self._digest.hex()[:16]} has {self._total} bytes, more were sent")
        rest = memoryview(chunk)
        with _explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Drop every byte."""
        self._file.seek(0)
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size = self.resumed = 0

    def finish(self) -> bool:
        """Give a whole shard its name; False, and every byte dropped, where they are not its bytes.

        Raises:
            DownloadError: the disk is full or fails.
        """
        if self._hash.digest() != self._digest:
            self.restart()
            return False
        target = self._cache._path(self._digest)
        with _explained(self._path):
            os.fsync(self._file.fileno())
            target.parent.mkdir(exist_ok=True)
            # The folder is not synced: a power cut may take the name back, never leave half a shard.
            self._path.replace(target)
        self._cache._remember(self._digest)
        return True

    def close(self) -> None:
        """Keep what is here for the next try."""
        try:
            if self.size == 0:
                self._path.unlink(missing_ok=True)
        finally:
            self._file.close()
            self._cache._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ShardCache:
    """A folder of shards; every method may be called from any thread.

    Args:
        folder: None chooses `default_folder`.
        limit_bytes: what shards, whole and in part, may take on the disk.

    Raises:
        DownloadError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes
        self._whole, self._parts, self._claims = (
            self.folder / name for name in ("shards", "arriving", "claims")
        )
        self._lock = threading.Lock()
        self._claimed: Counter[Sized] = Counter()
        self._claim_file: int | None = None
        self._claim_path = self._claims
        self._verified: set[bytes] = set()
        self._ended = threading.Condition()
        with _explained(self.folder):
            for path in (self._whole, self._parts, self._claims):
                path.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Give up all claims; safe to call twice."""
        with self._lock:
            self._claimed.clear()
            if self._claim_file is not None:
                self._claim_path.unlink(missing_ok=True)
                os.close(self._claim_file)
                self._claim_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- reading ------------------------------------------------------------------------------

    def has(self, digest: bytes, size: int) -> bool:
        """Whether a file of that name and size is there; its bytes are not looked at."""
        try:
            return self._path(digest).stat().st_size == size
        except OSError:
            return False

    def read(self, digest: bytes, size: int) -> bytes | None:
        """A shard's bytes, checked as in `open`; None where it is not here, or damaged."""
        if not self.has(digest, size):
            return None
        opened = self.open(digest)
        if opened is None:
            return None
        with opened[1] as file:
            try:
                content = file.read(size + 1)
            except OSError:
                return None
        return content if len(content) == size else None

    def open(self, digest: bytes) -> tuple[int, BufferedReader] | None:
        """Size and open file of a shard; None where it is not here, or damaged, and then it is removed.

        All of it is hashed when this process opens it for the first time: a power cut or a worn card may have
        changed it. The file stays readable even if the shard is removed meanwhile.
        """
        path = self._path(digest)
        try:
            file = path.open("rb")
        except OSError:
            return None
        if digest not in self._verified and not self._is_sound(file, digest):
            file.close()
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another user's file is as good
            os.utime(file.fileno())
        return os.fstat(file.fileno()).st_size, file

    def used_bytes(self) -> int:
        """What shards take on the disk, whole and in part."""
        return sum(entry.size for entry in (*self._scan(self._whole), *self._scan(self._parts)))

    def _is_sound(self, file: BufferedReader, digest: bytes) -> bool:
        try:
            if hashlib.file_digest(file, hashlib.sha256).digest() != digest:
                return False
        except OSError:
            return False
        file.seek(0)
        self._remember(digest)
        return True

    def _remember(self, digest: bytes) -> None:
        if len(self._verified) >= _MAX_VERIFIED:
            self._verified = set()
        self._verified.add(digest)

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._whole / name[:2] / name

    # --- arriving -----------------------------------------------------------------------------

    def arrive(self, digest: bytes, size: int, stop: threading.Event) -> Arriving | None:
        """Where a missing shard's bytes go; None if the shard is here, or `stop` was set.

        While another thread or process fetches the same shard, this waits. The caller holds a claim on it.

        Raises:
            DownloadError: the disk fails.
        """
        path = self._parts / digest.hex()
        while not stop.is_set():
            if self.has(digest, size):
                return None
            with _explained(path):
                file = _open_alone(path)
            if file is None:
                with self._ended:
                    self._ended.wait(_POLL_SECONDS)
                continue
            try:
                if not self.has(digest, size):
                    with _explained(path):
                        return Arriving(self, file, path, digest, size)
                path.unlink(missing_ok=True)  # another finished it between the look and the lock
            except BaseException:
                file.close()
                raise
            file.close()
        return None

    def _wake(self) -> None:
        with self._ended:
            self._ended.notify_all()

    # --- room ---------------------------------------------------------------------------------

    def claim(self, sizes: Mapping[bytes, int]) -> Claim:
        """Keep shards that are here, and room for those that are not.

        Args:
            sizes: digest -> bytes.

        Raises:
            DownloadError: the cache's limit, or the disk, has not enough room.
        """
        wanted = frozenset(sizes.items())
        with self._lock, _explained(self.folder), exclusive(self.folder / "cache.lock", wait=True):
            self._make_room(wanted)
            self._claimed.update(wanted)
            try:
                self._write_claims()
            except OSError:
                self._drop_claims(wanted)
                raise
        return Claim(self, wanted)

    def _release(self, shards: Iterable[Sized]) -> None:
        with self._lock, suppress(OSError), exclusive(self.folder / "cache.lock", wait=True):
            if self._claim_file is not None:
                self._drop_claims(shards)

    def _drop_claims(self, shards: Iterable[Sized]) -> None:
        self._claimed.subtract(shards)
        self._claimed = +self._claimed
        with suppress(OSError):  # the file then says what it said before: too much is kept, for too long
            self._write_claims()

    def _write_claims(self) -> None:
        if self._claim_file is None:
            descriptor, name = mkstemp(".claim", dir=self._claims)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._claim_file, self._claim_path = descriptor, Path(name)
        content = b"".join(_CLAIMED.pack(*shard) for shard in self._claimed)
        if os.pwrite(self._claim_file, content, 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self._claim_file, len(content))

    def _claims_of_others(self) -> set[Sized]:
        found: set[Sized] = set()
        for path in self._claims.glob("*.claim"):
            if path == self._claim_path:
                continue
            with suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    content = file.read()
                    whole = len(content) // _CLAIMED.size * _CLAIMED.size
                    found.update(_CLAIMED.iter_unpack(content[:whole]))
                else:
                    path.unlink(missing_ok=True)  # its process has ended
        return found

    def _make_room(self, wanted: frozenset[Sized]) -> None:
        """Remove what nobody claims until the claims fit; nothing, if they cannot fit."""
        claimed = wanted | set(self._claimed) | self._claims_of_others()
        shards, parts = list(self._scan(self._whole)), list(self._scan(self._parts))
        here = {(entry.digest, entry.size) for entry in shards}
        needed = sum(size for _, size in claimed)
        if needed > self.limit_bytes:
            own = sum(size for _, size in wanted)
            raise DownloadError(
                f"shards of {own / 1e6:.1f} MB are wanted and {(needed - own) / 1e6:.1f} MB of others are in "
                f"use; the cache {self.folder} may hold {self.limit_bytes / 1e6:.1f} MB: raise its limit, or "
                "give this device fewer neuron groups"
            )
        coming = {digest: size for digest, size in claimed if (digest, size) not in here}
        removable = [entry for entry in shards if (entry.digest, entry.size) not in claimed]
        removable += [entry for entry in parts if entry.digest not in coming]
        removable.sort()
        used = needed + sum(entry.size for entry in removable)
        begun = sum(min(entry.size, coming[entry.digest]) for entry in parts if entry.digest in coming)
        lacking = sum(coming.values()) - begun
        if lacking:
            lacking += _DISK_MARGIN - shutil.disk_usage(self.folder).free
        if lacking > sum(entry.size for entry in removable):
            raise DownloadError(
                f"{sum(coming.values()) / 1e6:.1f} MB of shards have to come to {self.folder}, "
                f"where {lacking / 1e6:.1f} MB are lacking; free some space on that disk, set EDGERT_HOME to "
                "a folder on a larger one, or give this device fewer neuron groups"
            )
        for entry in removable:
            if used <= self.limit_bytes and lacking <= 0:
                return
            entry.path.unlink(missing_ok=True)
            used -= entry.size
            lacking -= entry.size

    def _scan(self, folder: Path) -> Iterator[_Entry]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._scan(Path(entry.path))
                elif _NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        path = Path(entry.path)
                        yield _Entry(found.st_mtime_ns, found.st_size, bytes.fromhex(entry.name), path)


def _open_alone(path: Path) -> FileIO | None:
    """The file, made if there is none, with nobody else who has it open through here; None where there is."""
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # it was given its final name, or removed, before it was locked


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot write {path}: {error.strerror}; check the owner and the free space of that disk"
        ) from error
