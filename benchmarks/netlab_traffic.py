"""Programs that run in a lab's hosts and say what they saw: ``python -m benchmarks.netlab_traffic WHAT ...``.

All clocks are the one monotonic clock of this machine, so one-way delays are true. Each program prints
"ready" when it listens, and at its end one line of JSON.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any, Final

PORT: Final = 7007
_HEAD: Final = struct.Struct("<Qd")  # number, monotonic time of sending
_HEADERS: Final = 28  # bytes of IPv4 and UDP


def _udp(timeout: float | None = None) -> socket.socket:
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    endpoint.settimeout(timeout)
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
    return endpoint


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def echo(core: int | None = None) -> None:
    """Send every datagram back to where it came from, without end; on one core, if that is given."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    endpoint = _udp()
    endpoint.bind(("", PORT))
    print("ready", flush=True)
    while True:
        content, peer = endpoint.recvfrom(65_535)
        endpoint.sendto(content, peer)


def send(address: str, count: int, interval: float, size: int) -> None:
    """Send numbered datagrams of `size` bytes with their IP headers, one each `interval` seconds.

    Prints how many it sent.
    """
    endpoint = _udp()
    endpoint.connect((address, PORT))
    padding = bytes(size - _HEADERS - _HEAD.size)
    sent = 0
    start = time.monotonic()
    for number in range(count):
        pause = start + number * interval - time.monotonic()
        if pause > 0.0:
            time.sleep(pause)
        now = time.monotonic()
        try:
            endpoint.send(_HEAD.pack(number, now) + padding)
        except ConnectionRefusedError:
            continue  # nobody listens any more, which the receiver's list shows as well
        sent += 1
    _say(sent)


def receive(silence: float) -> None:
    """Print (number, one-way seconds, time of arrival) of each datagram, when none comes for `silence` s."""
    endpoint = _udp()
    endpoint.bind(("", PORT))
    print("ready", flush=True)
    seen = []
    while True:
        content = endpoint.recv(65_535)
        now = time.monotonic()
        endpoint.settimeout(silence)
        number, sent = _HEAD.unpack_from(content)
        seen.append((number, now - sent, now))
        if not select.select([endpoint], [], [], silence)[0]:
            _say(seen)
            return


def ping_pong(address: str, count: int, size: int) -> None:
    """Send a datagram, wait for its echo, and so on; prints the round-trip times in seconds."""
    endpoint = _udp(timeout=1.0)
    endpoint.connect((address, PORT))
    content = bytes(size - _HEADERS)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        endpoint.send(content)
        endpoint.recv(65_535)
        times.append(time.perf_counter() - started)
    _say(times)


def exchange(address: str, count: int, burst: int, size: int) -> None:
    """Send `burst` datagrams at once, wait for all their echoes, and so on; prints the times in seconds."""
    endpoint = _udp(timeout=1.0)
    endpoint.connect((address, PORT))
    content = bytes(size - _HEADERS)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        for _ in range(burst):
            endpoint.send(content)
        for _ in range(burst):
            endpoint.recv(65_535)
        times.append(time.perf_counter() - started)
    _say(times)


def compute() -> None:
    """Keep a core busy, as a model would; without end."""
    print("ready", flush=True)
    while True:
        sum(range(1000))


def icmp(address: str, count: int, interval: float, patience: float) -> None:
    """What `ping` does: echo requests to the other host's kernel. Prints round-trip times, null if lost."""
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    endpoint.connect((address, 0))
    times: list[float | None] = []
    for number in range(count):
        started = time.monotonic()
        endpoint.send(struct.pack(">BBHHH", 8, 0, 0, 0, number) + os.urandom(48))
        answer = None
        while answer is None and (left := started + patience - time.monotonic()) > 0.0:
            endpoint.settimeout(left)
            try:
                content = endpoint.recv(1024)
            except TimeoutError:
                break
            if content[0] == 0 and int.from_bytes(content[6:8], "big") == number:
                answer = time.monotonic() - started
        times.append(answer)
        time.sleep(max(0.0, started + interval - time.monotonic()))
    _say(times)


def stream_out(address: str, total: int) -> None:
    """Send `total` bytes over TCP and wait until all have arrived; prints the seconds."""
    with socket.create_connection((address, PORT)) as connection:
        started = time.monotonic()
        connection.sendall(bytes(total))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):
            pass
        _say(time.monotonic() - started)


def stream_in() -> None:
    """Take one TCP connection and everything that comes over it."""
    with socket.create_server(("", PORT)) as listener:
        print("ready", flush=True)
        connection, _ = listener.accept()
        with connection:
            buffer = bytearray(2**20)
            while connection.recv_into(buffer):
                pass


def main(words: list[str]) -> None:
    """Run one of the programs."""
    what, arguments = words[0], words[1:]
    if what == "echo":
        echo(*map(int, arguments))
    elif what == "send":
        send(arguments[0], int(arguments[1]), float(arguments[2]), int(arguments[3]))
    elif what == "compute":
        compute()
    elif what == "receive":
        receive(float(arguments[0]))
    elif what == "ping-pong":
        ping_pong(arguments[0], int(arguments[1]), int(arguments[2]))
    elif what == "exchange":
        exchange(arguments[0], int(arguments[1]), int(arguments[2]), int(arguments[3]))
    elif what == "icmp":
        icmp(arguments[0], int(arguments[1]), float(arguments[2]), float(arguments[3]))
    elif what == "stream-out":
        stream_out(arguments[0], int(arguments[1]))
    elif what == "stream-in":
        stream_in()
    else:
        sys.exit(f"unknown program {what!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
