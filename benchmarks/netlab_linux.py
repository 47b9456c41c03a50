"""The few calls to the Linux kernel that a lab needs: namespaces, TUN devices, what runs in a namespace."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_TIMERSLACK: Final = 29

_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
for _function in (_libc.unshare, _libc.setns, _libc.prctl):
    _function.restype = ctypes.c_int


def _checked(status: int, action: str) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")


def namespace_of_this_thread() -> int:
    """A file descriptor of the network namespace that the calling thread is in."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def new_namespace() -> int:
    """Move the calling thread into a new network namespace that has a name nowhere.

    It ends with the last process in it and the last open descriptor of it, however these end.

    Returns:
        A file descriptor of it.

    Raises:
        OSError: not allowed here.
    """
    _checked(_libc.unshare(_CLONE_NEWNET), "a network namespace could not be made (it needs root)")
    return namespace_of_this_thread()


def enter_namespace(descriptor: int) -> None:
    """Move the calling thread into the network namespace of `descriptor`."""
    _checked(_libc.setns(descriptor, _CLONE_NEWNET), "the network namespace could not be entered")


def open_tun(name: str) -> int:
    """Make the TUN device `name` in the calling thread's namespace; it lives as long as the descriptor.

    Raises:
        OSError: no /dev/net/tun, or not allowed.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return descriptor


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def be_punctual() -> bool:
    """Have the kernel run this process as soon as a packet or a timer is there, before any normal process.

    Returns:
        Whether that was allowed; if not, timers are exact at least.
    """
    _checked(_libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0), "PR_SET_TIMERSLACK")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except OSError:
        return False
    return True


def ip(*commands: str) -> str:
    """Run commands of the `ip` tool in the calling thread's namespace, all in one process; their output.

    Raises:
        OSError: one of them failed, or there is no such tool.
    """
    batch = "\n".join(commands) + "\n"
    done = subprocess.run(
        ["ip", "-details", "-oneline", "-batch", "-"],
        input=batch,
        capture_output=True,
        text=True,
        pass_fds=_descriptors(commands),
    )
    if done.returncode:
        raise OSError(f"ip failed: {done.stderr.strip()}; its commands were: {'; '.join(commands)}")
    return done.stdout


def _descriptors(commands: tuple[str, ...]) -> list[int]:
    # A namespace is named by a descriptor of the `ip` process itself.
    names = [word for command in commands for word in command.split() if word.startswith("/proc/self/fd/")]
    return [int(name.rpartition("/")[2]) for name in names]


def set_kernel_option(path: str, value: str) -> None:
    """Write /proc/sys/net/`path` of the calling thread's namespace, where this kernel has it."""
    option = Path("/proc/sys/net", path)
    if option.exists():
        option.write_text(value)


def dropped_by_device(descriptor: int, name: str) -> int:
    """Packets that device `name` of a namespace could not hand on. Moves the calling thread there."""
    enter_namespace(descriptor)
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == name:
            return int(counters.split()[11])
    return 0


def processes_in(namespace: int) -> list[int]:
    """Ids of the processes whose network namespace is the one of this descriptor, zombies left out.

    Raises:
        ValueError: it is the caller's own, where no lab has any business.
    """
    wanted = os.fstat(namespace)
    own = os.stat("/proc/thread-self/ns/net")  # noqa: PTH116
    if (own.st_ino, own.st_dev) == (wanted.st_ino, wanted.st_dev):
        raise ValueError("this is the network namespace of the caller, not of a host")
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 - a Path for each process costs more than the scan
        if entry.isdecimal():
            try:
                status = os.stat(f"/proc/{entry}/ns/net")  # noqa: PTH116
            except OSError:
                continue
            if (status.st_ino, status.st_dev) == (wanted.st_ino, wanted.st_dev):
                found.append(int(entry))
    return found


def signal_all(namespace: int, number: int) -> None:
    """Send a signal to every process in a namespace, also to those born meanwhile."""
    reached: set[int] = set()
    while True:
        new = [process for process in processes_in(namespace) if process not in reached]
        if not new:
            return
        for process in new:
            reached.add(process)
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue


def kill_all(namespace: int, patience: float = 5.0) -> None:
    """SIGKILL every process in a namespace and wait until none is left.

    Raises:
        TimeoutError: one outlived `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while remaining := processes_in(namespace):
        signal_all(namespace, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {remaining} are still there {patience} s after SIGKILL")
        time.sleep(0.002)
