"""Hosts on one machine, joined by a network that loses, delays and reorders packets as told.

    with Netlab([Host("a", core=0), Host("b", core=1)], link=LinkModel(delay=0.002, loss=0.05)) as lab:
        server = lab.run("b", ["some-server", "--listen", lab.address("b")])
        client = lab.run("a", ["some-client", lab.address("b")])

A host is a network namespace with one device, eth0, and any program runs in it. A lab whose links promise
nothing is joined by the kernel's own bridge; any other by a user-space switch on TUN devices. Needs Linux,
root and the `ip` tool. Nothing stays behind, however the program that made the lab ends.
"""

from __future__ import annotations

import array
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from benchmarks import netlab_linux as linux
from benchmarks.netlab_links import GilbertElliott, LinkModel
from benchmarks.netlab_switch import LATENESS_BINS, LATENESS_STEP, LONGEST_MESSAGE

__all__ = ["GilbertElliott", "Host", "LinkModel", "Netlab", "NetlabError", "why_not"]

_MOST_HOSTS: Final = 20
_NETWORK: Final = "10.77.0"
_PATIENCE: Final = 30.0  # seconds for an answer of the keeper
_REPOSITORY: Final = Path(__file__).resolve().parents[1]
Switch = Literal["auto", "user", "kernel"]


class NetlabError(RuntimeError):
    """The lab could not be built, or not do what was asked."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host of a lab; `core` is the only one that its processes may run on, None all."""

    name: str
    core: int | None = None


def why_not() -> str | None:
    """Why no lab can be made here, or None where one can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    try:
        with Netlab([Host("a"), Host("b")], switch="user"):
            return None
    except (OSError, NetlabError) as error:
        return str(error)


class Netlab:
    """A lab; also a context manager. One thread at a time may speak to the switch, others wait.

    Args:
        hosts: two or more, with names of their own; the n-th has the address 10.77.0.n.
        link: the model of every link in both directions, until `set_link` says otherwise.
        mtu: of every host's device, bytes.
        switch: "kernel" joins the hosts by the kernel's bridge, which can cut hosts off but has no other link
            model than the clean one; "user" by the user-space switch; "auto" takes the bridge where `link` is
            clean.
        switch_core: the only core that the switch may run on, None all.

    Raises:
        ValueError: hosts or link are not as described.
        NetlabError: this machine does not allow it.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        link: LinkModel | None = None,
        mtu: int = 1500,
        switch: Switch = "auto",
        switch_core: int | None = None,
    ) -> None:
        link = link or LinkModel()
        _check(hosts, mtu, link, switch)
        self._kernel = link.is_clean if switch == "auto" else switch == "kernel"
        self._hosts = {host.name: host for host in hosts}
        names = list(self._hosts)
        self._models = {(a, b): link for a in names for b in names if a != b}
        self._cut: set[str] = set()
        self._processes: dict[str, list[subprocess.Popen[Any]]] = {name: [] for name in names}
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_PATIENCE)
        with theirs:
            self._keeper = subprocess.Popen(
                [
                    sys.executable,
                    "-S",
                    "-m",
                    "benchmarks.netlab_keeper",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the terminal is not for it: it would come first
            )
        self._namespaces: dict[str, int] = {}
        try:
            self._build(link, mtu, switch_core)
        except BaseException:
            self.close()
            raise

    def _build(self, link: LinkModel, mtu: int, switch_core: int | None) -> None:
        message = {
            "hosts": {name: self.address(name) for name in self._hosts},
            "mtu": mtu,
            "default": link.as_json(),
            "kernel": self._kernel,
            "core": switch_core,
        }
        room = socket.CMSG_SPACE(4 * len(self._hosts))
        try:
            self._control.send(json.dumps(message).encode())
            content, ancillary, _, _ = self._control.recvmsg(LONGEST_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise NetlabError(f"the process that keeps the lab does not answer: {error}") from error
        descriptors = array.array("i")
        for _, _, content_of_message in ancillary:
            descriptors.frombytes(content_of_message)
        self._namespaces = dict(zip(self._hosts, descriptors, strict=False))
        self._understood(content)
        if len(descriptors) != len(self._hosts):
            raise NetlabError(f"the keeper made {len(descriptors)} of {len(self._hosts)} hosts")

    def __enter__(self) -> Netlab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, host: str) -> str:
        """The IPv4 address of a host."""
        return f"{_NETWORK}.{list(self._hosts).index(self._known(host)) + 1}"

    def namespace_path(self, host: str) -> str:
        """Where other tools find a host, as in ``nsenter --net=PATH``; good while the lab is open."""
        return f"/proc/{os.getpid()}/fd/{self._namespace(host)}"

    def run(
        self,
        host: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a program in a host; it has the process id of what is returned.

        Args:
            command: program and arguments; any program.
            env: its whole environment, None this process's own.
            options: what `subprocess.Popen` takes besides (stdout, text, cwd, ...).
        """
        namespace = self._namespace(host)
        core = self._hosts[host].core
        enter = str(Path(__file__).with_name("netlab_enter.py"))
        words = [sys.executable, "-IS", enter, str(os.getpid()), str(namespace)]
        words.append("-" if core is None else str(core))
        process: subprocess.Popen[Any] = subprocess.Popen(
            words + [str(word) for word in command], pass_fds=[namespace], env=env, **options
        )
        running = [other for other in self._processes[host] if other.poll() is None]
        self._processes[host] = [*running, process]
        return process

    def set_link(self, source: str, destination: str, model: LinkModel, *, one_way: bool = False) -> None:
        """Have the link between two hosts behave like `model` from now on, in both directions or one.

        Raises:
            NetlabError: the kernel's bridge joins the hosts, and it has no link models.
        """
        if self._kernel:
            raise NetlabError("the kernel's bridge has no link models; make the lab with switch='user'")
        pairs = [(source, destination)] if one_way else [(source, destination), (destination, source)]
        for pair in pairs:
            if pair not in self._models:
                raise ValueError(f"no link from {pair[0]} to {pair[1]}; hosts: {', '.join(self._hosts)}")
        for pair in pairs:
            self._models[pair] = model
            self._apply(*pair)

    def set_all_links(self, model: LinkModel) -> None:
        """`set_link` for every pair of hosts."""
        for source, destination in list(self._models):
            self.set_link(source, destination, model, one_way=True)

    def _apply(self, source: str, destination: str) -> None:
        model = self._models[source, destination]
        if self._cut & {source, destination}:
            model = replace(model, down=True)
        self._ask({"do": "link", "source": source, "destination": destination, "model": model.as_json()})

    def cut(self, host: str) -> None:
        """Silence every link of a host; its processes run on, and what is under way still arrives."""
        self._cut.add(self._known(host))
        self._renew_links(host)

    def restore(self, host: str) -> None:
        """Undo `cut` and `kill`, as far as the network goes; programs are the caller's to start again."""
        self._cut.discard(self._known(host))
        self._renew_links(host)

    def _renew_links(self, host: str) -> None:
        if self._kernel:
            self._ask({"do": "port", "host": host, "up": host not in self._cut})
            return
        for pair in self._models:
            if host in pair:
                self._apply(*pair)

    def kill(self, host: str) -> None:
        """The death of a host: its links fall silent, so that nobody hears of it, then SIGKILL for all."""
        self.cut(host)
        linux.kill_all(self._namespace(host))
        for process in self._processes[host]:
            process.kill()  # one that was about to enter the host
            process.wait()

    def freeze(self, host: str) -> None:
        """SIGSTOP for every process in a host; its links and its kernel go on."""
        linux.signal_all(self._namespace(host), signal.SIGSTOP)

    def thaw(self, host: str) -> None:
        """SIGCONT for every process in a host."""
        linux.signal_all(self._namespace(host), signal.SIGCONT)

    def switch_report(self, *, anew: bool = False) -> dict[str, Any]:
        """What the switch did so far.

        Args:
            anew: count from zero after this report.

        Returns:
            switch: "user space", or "kernel bridge", of which only dropped and cpu_seconds (0) are known.
            packets, bytes: that reached it. delivered: packets. cpu_seconds: of its processes together.
            dropped: packets by cause; "device queue" are those that a host sent faster than the switch read.
            lateness: seconds by which delayed packets left after their time: p50, p99 (to 10 us), longest.
            links: by "source -> destination", packets, bytes, delivered, duplicated, reordered.
        """
        report = self._ask({"do": "report", "anew": anew})
        links = report["links"].values()
        for counter in ("packets", "bytes", "delivered"):
            report[counter] = sum(link[counter] for link in links)
        bins = report["lateness"]
        report["lateness"] = {
            "p50": _percentile(bins, 0.5),
            "p99": _percentile(bins, 0.99),
            "longest": report.pop("longest_lateness"),
            "packets": sum(bins),
        }
        return report

    def _known(self, host: str) -> str:
        if host not in self._hosts:
            raise ValueError(f"no host {host!r}; hosts: {', '.join(self._hosts)}")
        return host

    def _namespace(self, host: str) -> int:
        if self._known(host) not in self._namespaces:
            raise NetlabError("the lab is closed")
        return self._namespaces[host]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            try:
                self._control.send(json.dumps(message).encode())
                return self._understood(self._control.recv(LONGEST_MESSAGE))
            except OSError as error:
                raise NetlabError(f"the process that keeps the lab does not answer: {error}") from error

    def _understood(self, content: bytes) -> dict[str, Any]:
        if not content:
            raise NetlabError(f"the process that keeps the lab ended with status {self._keeper.wait()}")
        answer: dict[str, Any] = json.loads(content)
        if "error" in answer:
            raise NetlabError(answer["error"])
        return answer

    def close(self) -> None:
        """End everything that runs in the hosts, and the network. Again: nothing."""
        self._control.close()
        self._keeper.wait()
        # The keeper has done this already, unless somebody killed it.
        for namespace in self._namespaces.values():
            linux.kill_all(namespace)
            os.close(namespace)
        self._namespaces = {}
        for processes in self._processes.values():
            for process in processes:
                process.kill()
                process.wait()


def _check(hosts: Sequence[Host], mtu: int, link: LinkModel, switch: Switch) -> None:
    names = [host.name for host in hosts]
    if not 2 <= len(names) <= _MOST_HOSTS:
        raise ValueError(f"{len(names)} hosts; a lab has 2 to {_MOST_HOSTS}")
    if len(set(names)) != len(names):
        raise ValueError(f"two hosts share a name: {', '.join(names)}")
    wrong = [name for name in names if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name)]
    if wrong:
        raise ValueError(f"host name {wrong[0]!r}: 1 to 64 letters, digits, dots, dashes and underscores")
    if not 576 <= mtu <= 65_000:
        raise ValueError(f"mtu {mtu}: between 576 and 65000 bytes")
    for host in hosts:
        if host.core is not None and host.core not in os.sched_getaffinity(0):
            raise ValueError(f"host {host.name} wants core {host.core}; there are {os.sched_getaffinity(0)}")
    if switch == "kernel" and not link.is_clean:
        raise ValueError("the kernel's bridge has no link models; use switch='user' or 'auto'")


def _percentile(bins: list[int], share: float) -> float:
    wanted, seen = share * sum(bins), 0
    for number, count in enumerate(bins):
        seen += count
        if count and seen >= wanted:
            return (number + 1) * LATENESS_STEP
    return 0.0 if not seen else LATENESS_BINS * LATENESS_STEP
