"""Memory that the engine maps, and advice to the kernel about it.

Advice may be refused; results never depend on it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading

import numpy as np

from edge_runtime.errors import OutOfMemoryError

_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1
_COLLAPSED_AT_ONCE = 8 * _HUGE_PAGE
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
if _libc is not None:
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.madvise.restype = ctypes.c_int


def _advise(address: int, size: int, advice: int, granularity: int = mmap.PAGESIZE) -> bool:
    """Give advice about the whole pages of a range; whether the kernel took it."""
    start = -(-address // granularity) * granularity
    stop = (address + size) // granularity * granularity
    return _libc is not None and (stop <= start or _libc.madvise(start, stop - start, advice) == 0)


def drop_pages(address: int, size: int) -> None:
    """Give back the resident pages of a read-only file mapping; they are read again when touched."""
    _advise(address, size, _MADV_DONTNEED)


def read_ahead(address: int, size: int) -> None:
    """Start reading a file mapping that is needed soon."""
    _advise(address, size, _MADV_WILLNEED)


class HugePages:
    """Moves a range to 2 MiB pages in the background: 4 KiB pages cost each token about 2.5 % in TLB misses.

    Asking for huge pages when the range is first written would be simpler, and takes a second or two of
    the start where memory is fragmented or belongs to a virtual machine. Kernels that cannot do it refuse
    the first step, and nothing more is tried.

    Args:
        delay: seconds to wait, so that the first answer is not disturbed.
    """

    def __init__(self, address: int, size: int, delay: float = 2.0) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._collapse, args=(address, size, delay), name="huge-pages", daemon=True
        )
        self._thread.start()

    def _collapse(self, address: int, size: int, delay: float) -> None:
        self._stopped.wait(delay)
        for start in range(address, address + size, _COLLAPSED_AT_ONCE):
            length = min(_COLLAPSED_AT_ONCE, address + size - start)
            if self._stopped.is_set():
                return
            # Some ranges may find no memory; only "invalid" says that the kernel has no such advice.
            if not _advise(start, length, _MADV_COLLAPSE, _HUGE_PAGE) and ctypes.get_errno() == errno.EINVAL:
                return

    def stop(self) -> None:
        """Stop before the range is freed; safe to call twice."""
        self._stopped.set()
        self._thread.join()


def zeroed(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """`size` zero bytes, page-aligned, that become resident only as they are written.

    Raises:
        OutOfMemoryError: the system refuses that much.
    """
    try:
        return np.frombuffer(mmap.mmap(-1, max(size, mmap.PAGESIZE)), np.uint8)
    except (OSError, OverflowError) as error:
        raise OutOfMemoryError(
            f"{size / 1e6:.0f} MB for the KV cache could not be reserved; choose a smaller context"
        ) from error
