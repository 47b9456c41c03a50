"""The C library takes the settings."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_glibc_takes_the_settings() -> None:
    # In a process of its own: the settings hold for good.
    program = "from edge_runtime.daemon.allocator import give_memory_back; print(give_memory_back())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
