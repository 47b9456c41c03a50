"""The process that owns a lab: its namespaces, devices, switch, and their end, whatever happens to others.

``python -m benchmarks.netlab_keeper CONTROL PARENT``: a descriptor of a sequenced-packet socket, and the id
of the process that asked. It clears up when that socket closes, that process ends, or SIGTERM or SIGINT
comes.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Final

from benchmarks import netlab_linux as linux
from benchmarks.netlab_links import LinkModel
from benchmarks.netlab_switch import DROPS, LATENESS_BINS, LONGEST_MESSAGE, Pump, fork_pump

DEVICE: Final = "eth0"
_PATIENCE: Final = 10.0  # seconds
_TUN_QUEUE: Final = 8192  # packets; that many wait where the switch is slower than a host


class Keeper:
    """One lab, as `message` describes it.

    Args:
        message: hosts (by name, their address), mtu, default (a link model), kernel (whether the kernel's
            bridge joins them), core (of the switch, or None).
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self._home = linux.namespace_of_this_thread()
        self._addresses: dict[str, str] = message["hosts"]
        self._mtu: int = message["mtu"]
        self._pumps: dict[str, tuple[int, socket.socket]] = {}
        self._bridge: int | None = None
        self._device_drops_before = 0
        self._cut_ports: frozenset[int] = frozenset()
        self.namespaces: dict[str, int] = {}
        for name in self._addresses:
            self.namespaces[name] = linux.new_namespace()
            _quiet_namespace()
        if message["kernel"]:
            self._join_by_bridge()
        else:
            self._join_by_switch(LinkModel.from_json(message["default"]), message["core"])
        linux.enter_namespace(self._home)

    def _join_by_switch(self, model: LinkModel, core: int | None) -> None:
        tuns = {}
        for name, address in self._addresses.items():
            linux.enter_namespace(self.namespaces[name])
            tuns[name] = linux.open_tun(DEVICE)
            linux.ip(
                f"link set {DEVICE} mtu {self._mtu} txqueuelen {_TUN_QUEUE} up",
                f"addr add {address}/24 dev {DEVICE}",
                f"route add default dev {DEVICE}",
            )
        linux.enter_namespace(self._home)
        for name, tun in tuns.items():
            others = {
                other: (socket.inet_aton(self._addresses[other]), tuns[other])
                for other in tuns
                if other != name
            }
            pump = Pump(name, tun, others, dict.fromkeys(others, model))
            self._pumps[name] = fork_pump(pump, core)
        for tun in tuns.values():
            os.close(tun)

    def _join_by_bridge(self) -> None:
        self._bridge = linux.new_namespace()
        _quiet_namespace()
        linux.ip("link add bridge0 type bridge", f"link set bridge0 mtu {self._mtu} up")
        addresses = list(self._addresses.items())
        for number, (name, address) in enumerate(addresses):
            linux.enter_namespace(self._bridge)
            linux.ip(
                f"link add port{number} type veth peer name {DEVICE} address {_mac(address)} "
                f"netns /proc/self/fd/{self.namespaces[name]}",
                f"link set port{number} mtu {self._mtu} master bridge0 up",
            )
            linux.enter_namespace(self.namespaces[name])
            # Neighbours are fixed: a silent link shall look silent, and not like a failed ARP.
            linux.ip(
                f"link set {DEVICE} mtu {self._mtu} up",
                f"addr add {address}/24 dev {DEVICE}",
                f"route add default dev {DEVICE}",
                *(
                    f"neigh replace {other} lladdr {_mac(other)} dev {DEVICE} nud permanent"
                    for _, other in addresses
                    if other != address
                ),
            )

        linux.enter_namespace(self._bridge)
        self._wait_for_ports(len(addresses))

    def _wait_for_ports(self, count: int) -> None:
        # The kernel notices in its own time that a device has a carrier, and forwards only then.
        deadline = time.monotonic() + _PATIENCE
        while linux.ip("link show master bridge0").count("state forwarding") < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {count} ports of the bridge forward after {_PATIENCE} s")
            time.sleep(0.005)

    def act(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what one message asks; its answer."""
        if message["do"] == "link":
            return self._ask(message["source"], message)
        if message["do"] == "port":
            return self._set_port(message["host"], message["up"])
        if message["do"] == "report":
            return self._report(message["anew"])
        raise ValueError(f"unknown message {message['do']!r}")

    def _ask(self, host: str, message: dict[str, Any]) -> dict[str, Any]:
        process, control = self._pumps[host]
        control.send(json.dumps(message).encode())
        content = control.recv(LONGEST_MESSAGE)
        if not content:
            raise RuntimeError(f"the switch process {process} of host {host} has ended")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _set_port(self, host: str, up: bool) -> dict[str, Any]:
        assert self._bridge is not None
        number = list(self._addresses).index(host)
        linux.enter_namespace(self._bridge)
        # Out of the bridge, and not down: the host's device shall keep its carrier.
        linux.ip(f"link set port{number} {'master bridge0' if up else 'nomaster'}")
        if up:
            cut = self._cut_ports - {number}
            self._wait_for_ports(len(self._addresses) - len(cut))
            self._cut_ports = cut
        else:
            self._cut_ports = self._cut_ports | {number}
        linux.enter_namespace(self._home)
        return {}

    def _report(self, anew: bool) -> dict[str, Any]:
        total: dict[str, Any] = {
            "switch": "kernel bridge" if self._bridge is not None else "user space",
            "cpu_seconds": 0.0,
            "dropped": dict.fromkeys(DROPS, 0),
            "lateness": [0] * LATENESS_BINS,
            "longest_lateness": 0.0,
            "links": {},
        }
        for name in self._pumps:
            part = self._ask(name, {"do": "report", "anew": anew})
            total["cpu_seconds"] += part["cpu_seconds"]
            total["longest_lateness"] = max(total["longest_lateness"], part["longest_lateness"])
            total["lateness"] = [a + b for a, b in zip(total["lateness"], part["lateness"], strict=True)]
            for cause, count in part["dropped"].items():
                total["dropped"][cause] += count
            for other, counters in part["links"].items():
                total["links"][f"{name} -> {other}"] = counters
        devices = (linux.dropped_by_device(namespace, DEVICE) for namespace in self.namespaces.values())
        device_drops = sum(devices)
        linux.enter_namespace(self._home)
        total["dropped"]["device queue"] = device_drops - self._device_drops_before
        if anew:
            self._device_drops_before = device_drops
        return total

    def close(self) -> None:
        """End every process in the hosts, then the switch. The namespaces end with their descriptors."""
        for namespace in self.namespaces.values():
            linux.kill_all(namespace)
        for process, control in self._pumps.values():
            control.close()
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _quiet_namespace() -> None:
    linux.ip("link set lo up")
    for scope in ("all", "default"):
        linux.set_kernel_option(f"ipv6/conf/{scope}/disable_ipv6", "1")
    linux.set_kernel_option("ipv4/ping_group_range", "0 2147483647")


def _mac(address: str) -> str:
    return "02:00:" + ":".join(f"{octet:02x}" for octet in socket.inet_aton(address))


def serve(control: socket.socket, parent: int) -> None:
    """Build what the first message describes and answer further ones until nobody is there any more."""
    keeper = Keeper(json.loads(control.recv(LONGEST_MESSAGE)))
    try:
        parent_end = os.pidfd_open(parent)
        descriptors = array.array("i", keeper.namespaces.values())
        control.sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        while os.getppid() == parent:
            watched: list[Any] = [control, parent_end]
            ready, _, _ = select.select(watched, [], [])
            content = control.recv(LONGEST_MESSAGE) if control in ready else b""
            if not content:
                return
            try:
                answer = keeper.act(json.loads(content))
            except (OSError, RuntimeError) as error:
                answer = {"error": str(error)}
            control.send(json.dumps(answer).encode())
    except ProcessLookupError:
        return  # the parent was gone before it could be watched
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        keeper.close()


def main(arguments: list[str]) -> None:
    """Run as a program."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    control = socket.socket(fileno=int(arguments[0]))
    try:
        serve(control, int(arguments[1]))
    except (OSError, RuntimeError, ValueError) as error:
        control.send(json.dumps({"error": str(error)}).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
