"""Work that must not slow down the tokens in progress: in a thread of its own, after everything else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Linux gives a thread with so much more niceness a tenth of what the other one on its core gets.
_NICENESS = 10
_MOST_NICENESS = 19


async def in_background(function: Callable[[], Value]) -> Value:
    """What a function gives that runs meanwhile, with less priority than the rest of the program.

    Where a system knows no priorities of threads it runs like everything else. A caller that is cancelled
    leaves it running.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Value] = loop.create_future()

    def tell(result: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if done.done() else result())

    def run() -> None:
        _give_way()
        try:
            value = function()
        except BaseException as error:
            failure = error
            tell(lambda: done.set_exception(failure))
        else:
            tell(lambda: done.set_result(value))

    # Not one of the loop's threads: an unprivileged program cannot give a thread its priority back.
    threading.Thread(target=run, name="background", daemon=True).start()
    return await done


def _give_way() -> None:
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness + _NICENESS, _MOST_NICENESS))
