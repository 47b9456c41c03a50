"""Work in the background gives way to everything else, and its outcome comes back."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

import pytest

from edge_runtime.cluster.background import in_background


def test_its_value_and_its_error_come_back() -> None:
    async def run() -> None:
        assert await in_background(threading.get_ident) != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await in_background(lambda: 1 // 0)

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_it_has_less_priority_and_nothing_else_has() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def run() -> tuple[int, int, int]:
        return await in_background(niceness), await asyncio.to_thread(niceness), niceness()

    there, pooled, here = asyncio.run(run())
    assert there > here == pooled or here == 19


def test_a_caller_that_goes_away_does_not_disturb_it() -> None:
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.2)
        ended.set()

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_background(work), 0.05)

    asyncio.run(run())  # the loop is closed before the work ends
    assert ended.wait(10)
