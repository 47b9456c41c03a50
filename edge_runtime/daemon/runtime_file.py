"""Who runs: ``daemon.json`` says how to reach the daemon of a home folder, ``daemon.lock`` whether it lives.

The lock is held by the kernel as long as the process lives, however it ends; so a file left by a daemon that
was killed is never believed, and there is never a second daemon for one home.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from edge_runtime.errors import ConfigError

LOCK_NAME = "daemon.lock"
FILE_NAME = "daemon.json"
SYSTEM_HOME = Path("/var/lib/edgert")  # of the service that deploy/install.sh sets up
_LARGEST_FILE = 65536
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
_READERS_SECONDS = 1.0  # readers hold the lock for microseconds; a daemon holds it longer than this


@dataclass(frozen=True, slots=True)
class RunningDaemon:
    """A daemon that lives.

    Attributes:
        http, grpc: HOST:PORT where it really listens; empty where it does not.
        tls: whether both speak TLS; ca: the PEM file to trust then, empty for the system's.
        started: seconds since the epoch.
        log: file that it writes its log to; empty for standard error.
        journal: whether its standard error is systemd's journal.
        unit: of systemd, empty where it was started otherwise.
        namespace: of process ids in the kernel; a pid means nothing outside of it.
    """

    pid: int
    http: str
    grpc: str
    tls: bool
    ca: str
    started: float
    version: str
    log: str = ""
    journal: bool = False
    unit: str = ""
    namespace: str = ""

    @property
    def url(self) -> str:
        """Of the HTTP API and the page, for this device; empty where there is none."""
        return f"{'https' if self.tls else 'http'}://{_reachable(self.http)}" if self.http else ""

    @property
    def grpc_target(self) -> str:
        """HOST:PORT of the gRPC API for this device; empty where there is none."""
        return _reachable(self.grpc)

    @property
    def same_machine(self) -> bool:
        """Whether its process id means the same process here, as it does not across containers."""
        return not self.namespace or self.namespace == _pid_namespace()


class RuntimeFile:
    """The claim of this process on a home folder; made by :func:`claim`."""

    def __init__(self, home: Path, lock: int) -> None:
        self._home = home
        self._lock: int | None = lock
        self._pid = os.getpid()

    def __enter__(self) -> RuntimeFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(
        self,
        *,
        http: str,
        grpc: str,
        version: str,
        tls: bool = False,
        ca: str = "",
        log: str = "",
        journal: bool = False,
        started: float | None = None,
    ) -> RunningDaemon:
        """Say how this daemon is reached, in one step: no reader sees half of it.

        Raises:
            OSError: the folder cannot be written.
        """
        running = RunningDaemon(
            pid=os.getpid(),
            http=http,
            grpc=grpc,
            tls=tls,
            ca=ca,
            started=time.time() if started is None else started,
            version=version,
            log=log,
            journal=journal,
            unit=_systemd_unit(),
            namespace=_pid_namespace(),
        )
        path = self._home / FILE_NAME
        new = path.with_suffix(".new")
        # Readable for others where the folder is: there is nothing secret in it.
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(running), file)
        new.replace(path)
        return running

    def close(self) -> None:
        """Remove the file and release the lock; safe to call twice, and of no effect in a forked child."""
        if self._lock is None or os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            (self._home / FILE_NAME).unlink()
        os.close(self._lock)  # the lock's file stays: another daemon may be opening it
        self._lock = None


def claim(home: Path) -> RuntimeFile:
    """Make this process the one daemon of a home folder.

    Raises:
        ConfigError: another one runs, or the folder cannot be written.
    """
    import fcntl

    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{home}: {error.strerror}; the daemon keeps its state there: make it writable for this user, or "
            "choose another folder with EDGERT_HOME"
        ) from error
    try:
        give_up = time.monotonic() + _READERS_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ConfigError(_already(home, os.pread(lock, 32, 0))) from None
                time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):
            (home / FILE_NAME).unlink()  # of a daemon that was killed
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(lock)
        raise
    return RuntimeFile(home, lock)


def read(home: Path) -> RunningDaemon | None:
    """The daemon of a home folder; None where none runs, or one that does not listen yet."""
    if not _locked(home / LOCK_NAME):
        return None
    try:
        with (home / FILE_NAME).open("rb") as file:
            found = json.loads(file.read(_LARGEST_FILE))
        known = RunningDaemon.__dataclass_fields__
        # A newer daemon may say more than this program knows.
        return RunningDaemon(**{key: value for key, value in found.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def find(home: Path) -> RunningDaemon | None:
    """The daemon of this home folder, else the one that the system runs as a service.

    The second only where ``EDGERT_HOME`` does not choose a folder.
    """
    own = read(home)
    if own is not None or os.environ.get("EDGERT_HOME"):
        return own
    return read(SYSTEM_HOME)


def is_starting(home: Path) -> bool:
    """Whether a daemon has this home folder that does not listen yet."""
    return _locked(home / LOCK_NAME) and not (home / FILE_NAME).exists()


def process_lives(pid: int) -> bool:
    """Whether there is such a process, of whomever."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _reachable(address: str) -> str:
    """What to connect to: "every address" is none, and no certificate is for it."""
    host, _, port = address.rpartition(":")
    return f"{_LOOPBACK_OF.get(host, host)}:{port}" if address else ""


def _locked(path: Path) -> bool:
    import fcntl

    with _opened(path) as lock:
        if lock is None:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _already(home: Path, written: bytes) -> str:
    pid = written.strip().decode("ascii", "replace")
    who = f"process {pid}" if pid.isdigit() else "another process"
    running = read(home)
    where = f" and listens on {running.http or running.grpc}" if running else ""
    return (
        f"a daemon runs already for {home}: {who}{where}; `edgert stop` ends it, and another EDGERT_HOME "
        "has room for a second one"
    )


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return ""


def _systemd_unit() -> str:
    """The unit of this process, where systemd started it as a service."""
    if not os.environ.get("INVOCATION_ID"):
        return ""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""
    last = groups.strip().rpartition("/")[2]
    return last if last.endswith(".service") else ""
