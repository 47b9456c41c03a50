"""The user-space switch: one process per host, which reads what that host sends and writes it to the others.

It competes with the hosts for the cores, so a packet on a link without delay goes straight from read to
write, and there are no objects for packets. One process per host and not one for all measured 11 against 13
microseconds a packet, and 127 against 200 for eight packets and their eight answers: two directions do not
queue behind each other.
"""

from __future__ import annotations

import gc
import heapq
import json
import os
import resource
import select
import socket
import time
from typing import Any, Final

from benchmarks.netlab_links import LOST, QUEUE_FULL, SILENT, Direction, LinkModel
from benchmarks.netlab_linux import be_punctual, die_with_parent

LONGEST_MESSAGE: Final = 64 * 1024  # of the control sockets, bytes
LATENESS_STEP: Final = 10e-6  # seconds; width of a bin of the lateness histogram
LATENESS_BINS: Final = 500  # the last one takes everything from 5 ms on
_MOST_WAITING: Final = 50_000  # packets under way at once; more are dropped as if a queue were full
_BATCH: Final = 32  # packets read in a row before the timers get their turn
_LONGEST_PACKET: Final = 65_535
_CAUSES: Final = {LOST: "loss", QUEUE_FULL: "queue", SILENT: "outage"}
DROPS: Final = ("loss", "queue", "outage", "unknown address", "refused by host")


class Pump:
    """Carries what one host sends.

    Args:
        source: name of that host.
        tun: its TUN device.
        outputs: by name of the other hosts, their address (4 bytes) and TUN device.
        models: by name, the link to each.
    """

    def __init__(
        self, source: str, tun: int, outputs: dict[str, tuple[bytes, int]], models: dict[str, LinkModel]
    ) -> None:
        now = time.monotonic()
        self._source = source
        self._tun = tun
        self._directions = {name: Direction(models[name], source, name, now) for name in outputs}
        self._routes = {address: (self._directions[name], tun) for name, (address, tun) in outputs.items()}
        self._all_routes = list(self._routes.values())
        self._waiting: list[tuple[float, int, Direction, int, bytes]] = []
        self._serial = 0
        self.start_counting()

    def start_counting(self) -> None:
        """Count from zero, in the process that this runs in."""
        self._dropped = dict.fromkeys(DROPS, 0)
        self._lateness = [0] * LATENESS_BINS
        self._longest_lateness = 0.0
        self._cpu_before = _cpu_seconds()
        for direction in self._directions.values():
            direction.forget_counts()

    def run(self, control: socket.socket) -> None:
        """Carry packets and answer messages until `control` is closed at the other end."""
        clock, wait, read = time.monotonic, select.select, os.read
        tun, waiting = self._tun, self._waiting
        watched: list[Any] = [tun, control]
        nothing: list[Any] = []
        while True:
            pause = None
            if waiting:
                pause = waiting[0][0] - clock()
                if pause <= 0.0:
                    self._deliver_due()
                    pause = max(0.0, waiting[0][0] - clock()) if waiting else None
            ready = wait(watched, nothing, nothing, pause)[0]
            if control in ready and not self._answer(control):
                return
            if tun in ready:
                for _ in range(_BATCH):
                    try:
                        packet = read(tun, _LONGEST_PACKET)
                    except BlockingIOError:
                        break
                    self._take(packet, clock())
                    if waiting and waiting[0][0] <= clock():
                        break

    def _take(self, packet: bytes, now: float) -> None:
        route = self._routes.get(packet[16:20])
        if route is None:
            self._flood(packet, now)
        else:
            self._pass_on(packet, now, *route)

    def _pass_on(self, packet: bytes, now: float, direction: Direction, output: int) -> None:
        due = direction.arrive(now, len(packet))
        if due < 0.0:
            self._dropped[_CAUSES[due]] += 1
            return
        for _ in range(direction.copies):
            if due <= now:
                self._write(direction, output, packet)
            elif len(self._waiting) < _MOST_WAITING:
                self._serial += 1
                heapq.heappush(self._waiting, (due, self._serial, direction, output, packet))
            else:
                self._dropped["queue"] += 1

    def _flood(self, packet: bytes, now: float) -> None:
        # Multicast (224/4) and broadcast go to every other host; nothing else is out there.
        if len(packet) >= 20 and packet[0] >> 4 == 4 and (packet[16] >= 224 or packet[19] == 255):
            for direction, output in self._all_routes:
                self._pass_on(packet, now, direction, output)
        else:
            self._dropped["unknown address"] += 1

    def _deliver_due(self) -> None:
        waiting = self._waiting
        while waiting:
            late = time.monotonic() - waiting[0][0]
            if late < 0.0:
                return
            _, _, direction, output, packet = heapq.heappop(waiting)
            self._write(direction, output, packet)
            self._lateness[min(int(late / LATENESS_STEP), LATENESS_BINS - 1)] += 1
            if late > self._longest_lateness:
                self._longest_lateness = late

    def _write(self, direction: Direction, output: int, packet: bytes) -> None:
        try:
            os.write(output, packet)
        except OSError:
            self._dropped["refused by host"] += 1
        else:
            direction.delivered += 1

    def _answer(self, control: socket.socket) -> bool:
        content = control.recv(LONGEST_MESSAGE)
        if not content:
            return False
        message = json.loads(content)
        answer: dict[str, Any] = {}
        if message["do"] == "link":
            direction = self._directions[message["destination"]]
            model = LinkModel.from_json(message["model"])
            direction.replace(model, self._source, message["destination"], time.monotonic())
        else:
            answer = self._report()
            if message["anew"]:
                self.start_counting()
        control.send(json.dumps(answer).encode())
        return True

    def _report(self) -> dict[str, Any]:
        return {
            "cpu_seconds": _cpu_seconds() - self._cpu_before,
            "dropped": self._dropped,
            "lateness": self._lateness,
            "longest_lateness": self._longest_lateness,
            "waiting": len(self._waiting),
            "links": {
                name: {
                    "packets": direction.packets,
                    "bytes": direction.octets,
                    "delivered": direction.delivered,
                    "duplicated": direction.duplicated,
                    "reordered": direction.reordered,
                }
                for name, direction in self._directions.items()
            },
        }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def fork_pump(pump: Pump, core: int | None) -> tuple[int, socket.socket]:
    """Start a process for a pump; it ends when the calling process does, or kills it.

    Returns:
        Its process id, and the socket over which it answers messages.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = os.fork()
    if process:
        theirs.close()
        return process, ours
    try:
        ours.close()
        die_with_parent()
        be_punctual()
        if core is not None:
            os.sched_setaffinity(0, {core})
        pump.start_counting()
        gc.disable()  # nothing here makes circles, and a collection would hold packets up
        pump.run(theirs)
    finally:
        os._exit(0)
