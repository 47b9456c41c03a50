"""Memory that the engine maps, and advice to the kernel about it.

Advice may be refused; results never depend on it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from edge_runtime.errors import OutOfMemoryError

_HUGE_PAGE = 2 << 20


def _advise(address: int, size: int, advice: int, granularity: int) -> None:
    start = -(-address // granularity) * granularity
    stop = (address + size) // granularity * granularity
    if stop > start:
        _libc.madvise(start, stop - start, advice)


if sys.platform.startswith("linux"):
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.madvise.restype = ctypes.c_int

    def use_huge_pages(address: int, size: int) -> None:
        """Ask for 2 MiB pages: weights are streamed once a token, and 4 KiB pages cost TLB misses."""
        _advise(address, size, mmap.MADV_HUGEPAGE, _HUGE_PAGE)

    def drop_pages(address: int, size: int) -> None:
        """Give back the resident pages of a read-only file mapping; they are read again when touched."""
        _advise(address, size, mmap.MADV_DONTNEED, mmap.PAGESIZE)

    def read_ahead(address: int, size: int) -> None:
        """Start reading a file mapping that is needed soon."""
        _advise(address, size, mmap.MADV_WILLNEED, mmap.PAGESIZE)

else:

    def use_huge_pages(address: int, size: int) -> None:
        """Nothing to ask for on this system."""

    def drop_pages(address: int, size: int) -> None:
        """Nothing to ask for on this system."""

    def read_ahead(address: int, size: int) -> None:
        """Nothing to ask for on this system."""


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
