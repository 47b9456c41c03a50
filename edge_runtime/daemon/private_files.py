"""Files with secrets: in place as a whole, durable, and never readable to others, not even while written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.model_store.files import move_into_place


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file in one step; its folder is made with mode 0700 where it is missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask says
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_key_permissions(path: Path) -> None:
    """Refuse a secret that others on this device can read.

    A key that the system's administrator owns may be readable to a group: so keys are lent to services.

    Raises:
        ConfigError: it can be read or written by others, or it is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `edgert init` makes certificates and keys") from error
    lent = found.st_uid == 0 and os.geteuid() != 0
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no file; `edgert init` makes certificates and keys")
    if found.st_mode & (0o037 if lent else 0o077):
        raise ConfigError(
            f"{path} holds a private key and has the mode {stat.S_IMODE(found.st_mode):04o}, so that others "
            f"can use it; chmod {'640' if lent else '600'} {path}"
        )
