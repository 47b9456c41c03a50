"""Files with secrets: in place as a whole, durable, and never readable to others, not even while written.

What the administrator makes in another user's folder, as with ``sudo edgert init`` for a service, becomes
that user's: otherwise the service could not read its own key.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.model_store.files import move_into_place


def make_folder(path: Path) -> None:
    """Make a folder of mode 0700, and those above it, where it is missing.

    Raises:
        OSError: it cannot be made.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _give_to_owner_of(path.parent, descriptor)
    finally:
        os.close(descriptor)


def make_file(path: Path) -> None:
    """Make an empty file where it is missing, and take it from others where they can read it: mode 0600.

    Raises:
        OSError: it cannot be opened for writing, or is a symbolic link.
    """
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor)
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        if found.st_size == 0:
            _give_to_owner_of(path.parent, descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file in one step; its folder is made with mode 0700 where it is missing.

    Raises:
        OSError: it cannot be written; what was there is unchanged then.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask says
            _give_to_owner_of(path.parent, descriptor)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_key_permissions(path: Path, origin: str = "`edgert init` makes certificates and keys") -> None:
    """Refuse a secret that others on this device can read.

    A key that the system's administrator owns may be readable to a group: so keys are lent to services.

    Args:
        origin: where such files come from, for a message that one is missing.

    Raises:
        ConfigError: it can be read or written by others, or it is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {origin}") from error
    lent = found.st_uid == 0 and os.geteuid() != 0
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no file; {origin}")
    if found.st_mode & (0o037 if lent else 0o077):
        raise ConfigError(
            f"{path} holds a private key and has the mode {stat.S_IMODE(found.st_mode):04o}, so that others "
            f"can use it; chmod {'640' if lent else '600'} {path}"
        )


def _give_to_owner_of(folder: Path, descriptor: int) -> None:
    if os.geteuid() == 0:
        owner = folder.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
