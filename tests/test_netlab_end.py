"""Nothing of a lab stays behind, however the program that made it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.netlab import Host, Netlab, NetlabError, why_not

_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"no lab can be made here: {_REASON}")

REPOSITORY = Path(__file__).resolve().parents[1]
_PROGRAM = """
import os, signal, sys, time
from benchmarks.netlab import Host, Netlab
with Netlab([Host("a"), Host("b")], switch=sys.argv[1]) as lab:
    lab.run("a", ["sh", "-c", "sleep 1000 & sleep 1000"])
    lab.run("b", ["setsid", "sleep", "1000"])
    time.sleep(0.3)
    print(os.readlink(lab.namespace_path("a")), os.readlink(lab.namespace_path("b")), flush=True)
    {end}
"""
_ENDS: dict[str, str] = {
    "returns": "pass",
    "raises": "raise RuntimeError('on purpose')",
    "exits at once": "os._exit(3)",
    "is terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


def users_of(namespace: str) -> list[str]:
    """What runs in a namespace or holds it open, zombies left out; `namespace` reads as net:[4026532...]."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                held = [str((entry / "ns" / "net").readlink())]
                held += [str(descriptor.readlink()) for descriptor in (entry / "fd").iterdir()]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if namespace in held:
                found.append(f"{entry.name}: {command}")
    return found


def becomes_true(claim: Callable[[], bool], patience: float = 10.0) -> bool:
    deadline = time.monotonic() + patience
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("switch", ["kernel", "user"])
@pytest.mark.parametrize("end", _ENDS)
def test_nothing_is_left_when_the_program(end: str, switch: str) -> None:
    program = _PROGRAM.replace("{end}", _ENDS[end])
    done = subprocess.run(
        [sys.executable, "-c", program, switch], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    namespaces = done.stdout.split()
    assert len(namespaces) == 2, done.stderr
    for namespace in namespaces:
        assert becomes_true(lambda name=namespace: not users_of(name)), users_of(namespace)


def test_a_child_that_outlives_the_program_does_not_keep_the_hosts_alive() -> None:
    end = (
        "child = os.fork() or (os.close(1), os.close(2), time.sleep(60), os._exit(0))\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", _PROGRAM.replace("{end}", end), "user"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    namespace, other, child = done.stdout.split()
    try:
        # The child holds descriptors of the lab, as it holds all of its parent's.
        assert becomes_true(lambda: [user.split(":")[0] for user in users_of(namespace)] == [child])
    finally:
        os.kill(int(child), signal.SIGKILL)
    assert becomes_true(lambda: not users_of(namespace) + users_of(other))


def test_killing_the_keeper_ends_the_lab_with_a_clear_error() -> None:
    with Netlab([Host("a"), Host("b")], switch="user") as lab:
        sleeper = lab.run("a", ["sh", "-c", "sleep 1000 & wait"])
        time.sleep(0.2)
        keeper = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in keeper}
        found = [child for child, words in names.items() if b"netlab_keeper" in words]
        assert len(found) == 1
        namespace = str(Path(lab.namespace_path("a")).readlink())
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(NetlabError, match="keeps the lab"):
            lab.switch_report()
    assert sleeper.returncode == -9
    assert becomes_true(lambda: not users_of(namespace))


def test_labs_exist_beside_each_other() -> None:
    with Netlab([Host("a"), Host("b")]) as first, Netlab([Host("a"), Host("b")]) as second:
        one, other = (str(Path(lab.namespace_path("a")).readlink()) for lab in (first, second))
        assert one != other
        first.close()
        with pytest.raises(NetlabError, match="closed"):
            first.run("a", ["true"])
        assert second.run("a", ["true"]).wait() == 0
