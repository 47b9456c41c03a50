"""``netlab_enter.py PARENT NAMESPACE CORE PROGRAM [ARGUMENT...]``: becomes PROGRAM inside a host of a lab.

PARENT is the process id of the caller, NAMESPACE an open descriptor, CORE a number or ``-``. It runs as a
file of its own, imports as little as it can and keeps its process id, so that whoever started it has the
program itself in hand.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNET = 0x40000000


def main(arguments: list[str]) -> None:
    """Enter and become the program; 127 is the exit status where there is no such program."""
    parent, namespace, core = int(arguments[0]), int(arguments[1]), arguments[2]
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        sys.exit(f"the host could not be entered: {os.strerror(ctypes.get_errno())}")
    os.close(namespace)
    if os.getppid() != parent:
        sys.exit("whoever started this has ended")  # and the lab may have been cleared already
    if core != "-":
        os.sched_setaffinity(0, {int(core)})
    try:
        os.execvp(arguments[3], arguments[3:])
    except OSError as error:
        print(f"{arguments[3]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
