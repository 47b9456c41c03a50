"""What a lab promises is what a ping and a flow in its hosts see."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.netlab import GilbertElliott, Host, LinkModel, Netlab, NetlabError, why_not
from benchmarks.netlab_links import LOST, Direction

_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"no lab can be made here: {_REASON}")

REPOSITORY = Path(__file__).resolve().parents[1]
HOSTS = [Host("a"), Host("b")]


class Seen(NamedTuple):
    """A datagram as the receiver saw it; times in seconds."""

    number: int
    delay: float
    arrival: float


def start(lab: Netlab, host: str, *words: object) -> subprocess.Popen[str]:
    """Start one of the traffic programs in a host; a listening one is ready when this returns."""
    command = [sys.executable, "-m", "benchmarks.netlab_traffic", *(str(word) for word in words)]
    process = lab.run(host, command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if words[0] in ("echo", "receive", "stream-in"):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return process


def result(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def flow(lab: Netlab, count: int, interval: float, size: int = 200, silence: float = 0.5) -> list[Seen]:
    """Send `count` datagrams from a to b, one each `interval` seconds; what arrived, in its order."""
    receiver = start(lab, "b", "receive", silence)
    sent = result(start(lab, "a", "send", lab.address("b"), count, interval, size))
    assert sent == count
    return [Seen(*fields) for fields in result(receiver)]


def ping(lab: Netlab, source: str, destination: str, count: int = 20) -> list[float | None]:
    """Round-trip times of ICMP echo requests, None for those without an answer within 0.2 s."""
    times: list[float | None] = result(
        start(lab, source, "icmp", lab.address(destination), count, 0.005, 0.2)
    )
    return times


@pytest.fixture
def lab() -> Iterator[Netlab]:
    with Netlab(HOSTS, switch="user") as lab:
        yield lab


@pytest.mark.parametrize("switch", ["kernel", "user"])
def test_a_clean_lab_loses_nothing_and_keeps_order(switch: Any) -> None:
    with Netlab(HOSTS, switch=switch) as lab:
        seen = flow(lab, 2000, 0.0002, size=1400)
        assert [packet.number for packet in seen] == list(range(2000))
        assert None not in ping(lab, "b", "a")
        report = lab.switch_report()
    assert report["switch"] == {"kernel": "kernel bridge", "user": "user space"}[switch]
    assert sum(report["dropped"].values()) == 0


def test_links_that_promise_nothing_take_the_kernels_bridge() -> None:
    with Netlab(HOSTS) as lab:
        assert lab.switch_report()["switch"] == "kernel bridge"
        with pytest.raises(NetlabError, match="switch='user'"):
            lab.set_link("a", "b", LinkModel(loss=0.1))


def test_the_packets_lost_are_those_the_seed_says(lab: Netlab) -> None:
    model = LinkModel(loss=0.1, seed=7)
    lab.set_link("a", "b", model, one_way=True)
    seen = flow(lab, 3000, 0.0002)
    direction = Direction(model, "a", "b", 0.0)
    expected = [number for number in range(3000) if direction.arrive(0.0, 200) != LOST]
    assert [packet.number for packet in seen] == expected
    assert abs(len(seen) - 2700) < 4.0 * math.sqrt(3000 * 0.1 * 0.9)
    report = lab.switch_report(anew=True)
    assert report["dropped"]["loss"] == 3000 - len(seen)
    assert report["links"]["a -> b"]["packets"] == 3000
    assert report["bytes"] == 3000 * 200
    assert report["cpu_seconds"] > 0.0
    report = lab.switch_report()
    assert (report["packets"], report["bytes"], report["dropped"]["loss"]) == (0, 0, 0)
    assert None not in ping(
        lab, "b", "a", 1
    )  # the way back is as it was; this one echo returned by chance 0.9


def test_bursts_lose_packets_in_a_row(lab: Netlab) -> None:
    model = LinkModel(bursts=GilbertElliott(to_bad=0.02, to_good=0.2), seed=2)
    lab.set_link("a", "b", model, one_way=True)
    numbers = [packet.number for packet in flow(lab, 3000, 0.0002)]
    direction = Direction(model, "a", "b", 0.0)
    assert numbers == [number for number in range(3000) if direction.arrive(0.0, 200) != LOST]
    gaps = [later - earlier - 1 for earlier, later in itertools.pairwise(numbers)]
    bursts = [gap for gap in gaps if gap]
    assert 3.0 < statistics.mean(bursts) < 7.5  # 5 expected; some 55 bursts, standard error 0.6


def test_a_ping_sees_the_delay_of_both_ways(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(delay=0.03), one_way=True)
    lab.set_link("b", "a", LinkModel(delay=0.01), one_way=True)
    times = [time for time in ping(lab, "a", "b") if time is not None]
    assert len(times) == 20
    assert min(times) >= 0.04
    assert statistics.median(times) < 0.05  # the rest is what a busy machine adds


def test_delays_fill_the_width_of_the_jitter_and_order_is_kept(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(delay=0.01, jitter=0.006, seed=1))
    seen = flow(lab, 200, 0.013)  # further apart than the jitter is wide: each shows its own delay
    delays = sorted(packet.delay for packet in seen)
    assert len(delays) == 200
    assert delays[0] >= 0.004
    assert delays[10] == pytest.approx(0.0046, abs=0.0015)
    assert delays[100] == pytest.approx(0.010, abs=0.002)
    assert delays[190] == pytest.approx(0.0154, abs=0.0025)
    dense = [packet.number for packet in flow(lab, 500, 0.0005)]
    assert dense == list(range(500))


def test_a_flow_gets_the_rate_and_the_queue_it_was_promised(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(bytes_per_second=200_000, queue_bytes=60_000), one_way=True)
    seen = flow(lab, 150, 0.0, size=1000)
    seconds = seen[-1].arrival - seen[0].arrival
    rate = (len(seen) - 1) * 1000 / seconds
    assert rate == pytest.approx(200_000, rel=0.1)
    assert 60 <= len(seen) < 100  # 60 fit the queue; a few more find room while the flood lasts
    assert lab.switch_report()["dropped"]["queue"] == 150 - len(seen)


def test_some_packets_are_overtaken_where_that_was_asked_for(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(delay=0.001, reorder=0.1, reorder_delay=0.02, seed=4), one_way=True)
    numbers = [packet.number for packet in flow(lab, 500, 0.002)]
    assert sorted(numbers) == list(range(500))
    overtaken = sum(later < earlier for earlier, later in itertools.pairwise(numbers))
    assert 15 < overtaken < 85  # 50 expected, a standard deviation is 6.7, neighbours may share a place


def test_some_packets_arrive_twice_where_that_was_asked_for(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(duplicate=0.2, seed=5), one_way=True)
    numbers = [packet.number for packet in flow(lab, 1000, 0.0003)]
    assert sorted(set(numbers)) == list(range(1000))
    assert abs(len(numbers) - 1200) < 5.0 * math.sqrt(1000 * 0.2 * 0.8)
    assert lab.switch_report()["links"]["a -> b"]["duplicated"] == len(numbers) - 1000


def test_a_flapping_link_falls_silent_again_and_again(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(outage_every=0.4, outage_seconds=0.2), one_way=True)
    numbers = [packet.number for packet in flow(lab, 800, 0.002)]  # 1.6 s: four outages
    gaps = [later - earlier - 1 for earlier, later in zip([-1, *numbers], [*numbers, 800], strict=True)]
    long = [gap for gap in gaps if gap > 50]
    assert 3 <= len(long) <= 5
    assert sum(gaps) == pytest.approx(400, abs=110)


def test_a_host_cut_off_sees_nothing_until_it_is_restored() -> None:
    for switch in ("kernel", "user"):
        with Netlab([*HOSTS, Host("c")], switch=switch) as lab:
            lab.cut("b")
            assert ping(lab, "a", "b", 2) == [None, None]
            assert ping(lab, "b", "c", 2) == [None, None]
            assert None not in ping(lab, "a", "c", 2)
            lab.restore("b")
            assert None not in ping(lab, "a", "b", 2)


def test_a_cut_keeps_the_links_model(lab: Netlab) -> None:
    lab.set_link("a", "b", LinkModel(delay=0.03))
    lab.cut("b")
    lab.restore("b")
    assert all(time is not None and time >= 0.06 for time in ping(lab, "a", "b", 3))


def test_a_host_dies_in_silence_and_comes_back(lab: Netlab) -> None:
    server = start(lab, "b", "stream-in")
    child = lab.run("b", ["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    script = (
        "import socket, sys; c = socket.create_connection((sys.argv[1], 7007)); print('up', flush=True)\n"
        "c.settimeout(0.5)\n"
        "try: print(repr(c.recv(1)))\n"
        "except TimeoutError: print('silence')"
    )
    client = lab.run("a", [sys.executable, "-c", script, lab.address("b")], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    assert client.stdout.readline() == "up\n"
    lab.kill("b")
    assert server.returncode == child.returncode == -9
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()
    assert client.communicate(timeout=30)[0] == "silence\n"
    assert ping(lab, "a", "b", 1) == [None]
    lab.restore("b")
    start(lab, "b", "echo").stdout.close()
    assert len(result(start(lab, "a", "ping-pong", lab.address("b"), 10, 500))) == 10
    server.stdout.close()
    child.stdout.close()


def test_a_frozen_host_answers_when_it_thaws(lab: Netlab) -> None:
    server = start(lab, "b", "echo")
    lab.freeze("b")
    assert Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    client = start(lab, "a", "exchange", lab.address("b"), 1, 5, 200)
    time.sleep(0.3)
    assert client.poll() is None
    assert None not in ping(lab, "a", "b", 2)  # its kernel is awake
    lab.thaw("b")
    assert len(result(client)) == 1
    server.stdout.close()


def test_multicast_reaches_every_other_host(lab: Netlab) -> None:
    listen = (
        "import socket as k; s = k.socket(k.AF_INET, k.SOCK_DGRAM); s.bind(('', 5353))\n"
        "s.setsockopt(k.IPPROTO_IP, k.IP_ADD_MEMBERSHIP, k.inet_aton('224.0.0.251') + bytes(4))\n"
        "print('ready', flush=True); print(s.recv(100).decode())"
    )
    speak = "import socket; socket.socket(2, 2).sendto(b'hello', ('224.0.0.251', 5353))"
    listener = lab.run("b", [sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "ready\n"
    lab.run("a", [sys.executable, "-c", speak]).wait()
    assert listener.communicate(timeout=10)[0] == "hello\n"


def test_foreign_programs_run_in_a_host_on_its_core() -> None:
    core = min(os.sched_getaffinity(0))
    with Netlab([Host("a", core=core), Host("b")], mtu=1280) as lab:
        script = (
            "ip -o link show eth0; ip -o -4 addr show eth0; grep Cpus_allowed_list /proc/self/status; echo $X"
        )
        process = lab.run("a", ["sh", "-c", script], env={**os.environ, "X": "set"}, stdout=subprocess.PIPE)
        output = process.communicate(timeout=10)[0].decode()
        assert " mtu 1280 " in output
        assert f" {lab.address('a')}/24 " in output
        assert output.split()[-2:] == [str(core), "set"]
        missing = lab.run("a", ["no-such-program"], stderr=subprocess.PIPE)
        assert b"no-such-program" in missing.communicate(timeout=10)[1]
        assert missing.returncode == 127


def test_hosts_do_not_reach_what_is_outside(lab: Netlab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        process = lab.run("a", [sys.executable, "-c", script], stderr=subprocess.PIPE)
        assert b"refused" in process.communicate(timeout=30)[1]


@pytest.mark.parametrize(
    "hosts",
    [[Host("a")], [Host("a"), Host("a")], [Host("a"), Host("b c")], [Host("a"), Host("b", core=4096)]],
)
def test_impossible_hosts_are_refused(hosts: list[Host]) -> None:
    with pytest.raises(ValueError, match="host"):
        Netlab(hosts)


def test_unknown_hosts_are_named(lab: Netlab) -> None:
    with pytest.raises(ValueError, match="no host 'x'; hosts: a, b"):
        lab.run("x", ["true"])
    with pytest.raises(ValueError, match="no link from a to x"):
        lab.set_link("a", "x", LinkModel())
