"""``edgert cluster`` with two real daemons on loopback, one of which cannot hold the model by itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster_devices import Device
from program import REPOSITORY, Terminal, wait_until

GREEDY = ("--temperature", "0", "--max-tokens", "12")
QUESTION = "Where does Paul Colton live?"
# The demo model takes 5.7 MB: with 4 MB its owner needs somebody else.
LITTLE = {"EDGERT_CLUSTER_MEMORY_MB": "4"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[tuple[Device, Device]]:
    """Anna, who founded the cluster, and Berta, who joined; Anna's model is spread over both."""
    folder = tmp_path_factory.mktemp("pair")
    anna, berta = Device(folder, "anna", **LITTLE), Device(folder, "berta")
    with anna.serving(), berta.serving():
        joined = berta.join(anna.invitation())
        assert joined.code == 0, joined.err
        wait_until(lambda: "works" in anna.states().values(), 60)
        yield anna, berta


@pytest.fixture
def alone(tmp_path: Path) -> Device:
    """A device that is in no cluster and runs no daemon."""
    return Device(tmp_path, "carl", EDGERT_MODEL_PRELOAD="false")


# --- who is there, who computes what ----------------------------------------------------------


def test_both_devices_see_each_other(pair: tuple[Device, Device]) -> None:
    anna, berta = pair
    assert anna.states() == {"anna": "here", "berta": "works"}
    assert berta.states() == {"anna": "idle", "berta": "here"}
    assert anna.cluster()["is_founder"] is True
    assert berta.cluster()["is_founder"] is False
    assert anna.cluster()["fingerprint"] == berta.cluster()["fingerprint"]
    shown = anna.ok("cluster", "status").out
    assert shown.startswith("anna · founder of this cluster · 2 members\n")
    assert re.search(rf"^berta +works +1\.1 GB +1 .* ms +{berta.address}$", shown, re.MULTILINE)


def test_answers_of_the_cluster_are_those_of_one_device(pair: tuple[Device, Device]) -> None:
    anna, _ = pair
    before = anna.cluster()["models"][0]["on_time"]
    through = anna.ok("run", "--verbose", *GREEDY, QUESTION)
    assert "answered by the daemon" in through.err
    assert through.out == anna.ok("run", "--local", *GREEDY, QUESTION).out
    (model,) = anna.cluster()["models"]
    assert model["on_time"] > before
    assert model["tokens"] > 0


def test_status_shows_shares_times_and_contributions(pair: tuple[Device, Device]) -> None:
    anna, _ = pair
    anna.ok("run", *GREEDY, QUESTION)
    (model,) = anna.cluster()["models"]
    assert [node["name"] for node in model["nodes"]] == ["anna", "berta"]
    assert sum(node["share"] for node in model["nodes"]) == pytest.approx(1)
    assert all(node["groups"] for node in model["nodes"])
    shown = anna.ok("cluster", "status").out
    for node in model["nodes"]:
        assert re.search(rf"^  {node['name']} +[█▏▎▍▌▋▊▉]+ +{node['share']:.0%}"[:-1], shown, re.MULTILINE)
    for words in ("the model does not fit anna alone", "predicted", "on time", "asked again", "it waits"):
        assert words in shown
    assert "\x1b" not in shown


def test_layers_are_shown_when_asked_for(pair: tuple[Device, Device]) -> None:
    anna, _ = pair
    assert "COMPUTE" not in anna.ok("cluster", "status").out
    shown = anna.ok("cluster", "status", "--layers").out
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +[\d.]+ ms +[\d.]+ ms +[\d.]+ ms", shown, re.MULTILINE)
    assert [int(layer) for layer, _, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert {int(own) + int(others) for _, own, others in rows} == {24}


def test_status_watches_until_it_is_interrupted(pair: tuple[Device, Device]) -> None:
    anna, _ = pair
    with Terminal(anna.command("cluster", "status", "--watch"), anna.environment()) as terminal:
        terminal.until("2 members")
        terminal.until("2 members")
        terminal.interrupt_until("interrupted")


def test_plan_says_why_it_is_as_it_is(pair: tuple[Device, Device]) -> None:
    anna, berta = pair
    shown = anna.ok("cluster", "plan").out
    assert "Both devices are used: the model does not fit anna alone." in shown
    assert re.search(r"^anna +\d+ % +\d+ .* GB/s +- +- +-$", shown, re.MULTILINE)
    assert re.search(r"^berta +\d+ % +\d+ .* ms ± .* ms +\d+ % +\d$", shown, re.MULTILINE)
    assert "A token should take" in shown
    found = anna.ok("cluster", "plan", "demo", "--json").json
    assert (found["model"], found["unused"]) == ("demo", {})
    # Berta needs nobody, and says so of Anna.
    assert "\nNot used:\n  anna: " in berta.ok("cluster", "plan").out
    assert "anna" in berta.ok("cluster", "plan", "--json").json["unused"]


def test_plan_of_a_model_that_is_not_in_memory_says_which_are(pair: tuple[Device, Device]) -> None:
    done = pair[0]("cluster", "plan", "absent")
    assert (done.code, "demo is; `edgert run --model` loads one" in done.err) == (2, True)


def test_bench_measures_both_modes(pair: tuple[Device, Device]) -> None:
    anna, _ = pair
    shown = anna.ok("cluster", "bench", "--tokens", "8", "--rounds", "2").out
    for mode in ("exact", "relaxed"):
        assert re.search(rf"^{mode} +2 +14 +[\d.]+ m?s +[\d.]+ m?s", shown, re.MULTILINE), shown
    found = anna.ok("cluster", "bench", "demo", "--tokens", "8", "--rounds", "1", "--json").json
    exact, relaxed = found["modes"]
    assert (exact["mode"], relaxed["mode"]) == ("exact", "relaxed")
    assert exact["p95_seconds"] >= exact["p50_seconds"] > 0
    assert exact["on_time"] + exact["recomputed"] > 0
    assert exact["late"] == exact["lost"] == 0
    assert anna("cluster", "bench", "absent").code == 4


# --- invitations ------------------------------------------------------------------------------


def test_invite_founds_a_cluster_and_writes_nothing_but_the_invitation(alone: Device) -> None:
    done = alone.ok("cluster", "invite", "--name", "carl")
    assert re.fullmatch(r"edgert1\.[\w-]{500,3000}\n", done.out)
    for words in ("has founded a cluster", "edgert cluster join", "15m", alone.address, "`edgert serve`"):
        assert words in done.err
    again = alone.ok("cluster", "invite", "--valid", "2h", "--address", "192.0.2.7", "--json").json
    assert again["name"] == "carl"
    assert again["founded"] is False
    assert again["in_force"] is False
    assert again["addresses"] == [f"192.0.2.7:{alone.port}"]


def test_a_device_that_listens_everywhere_is_invited_to_all_its_addresses(alone: Device) -> None:
    everywhere = {"EDGERT_CLUSTER_LISTEN": "0.0.0.0:8422"}
    done = alone("cluster", "invite", "--json", environment=everywhere)
    if done.code == 2:
        assert "no network address" in done.err
        return
    addresses = done.json["addresses"]
    assert all(address.endswith(":8422") for address in addresses)
    assert not any(address.startswith(("0.0.0.0", "127.")) for address in addresses)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--valid", "soon"), "--valid 'soon' is no span of time"),
        (("--valid", "30d"), "up to 7 days"),
        (("--name", "Küche"), "is no name for a device"),
        (("--address", "host:0"), "is no address"),
    ],
)
def test_faulty_options_of_invite_are_refused(
    alone: Device, options: tuple[str, str], complaint: str
) -> None:
    done = alone("cluster", "invite", *options)
    assert done.code == 2
    assert complaint in done.err


def test_a_port_that_nobody_knows_is_asked_for(alone: Device) -> None:
    done = alone("cluster", "invite", environment={"EDGERT_CLUSTER_LISTEN": "127.0.0.1:0"})
    assert done.code == 2
    assert "--address HOST:PORT" in done.err


def test_only_the_founder_invites_and_keeps_its_name(pair: tuple[Device, Device]) -> None:
    anna, berta = pair
    done = berta("cluster", "invite")
    assert done.code == 11
    assert f"only anna ({anna.address}) can invite" in done.err
    done = anna("cluster", "invite", "--name", "other")
    assert done.code == 2
    assert "keeps that name" in done.err


def test_a_damaged_invitation_is_told_from_none_at_all(alone: Device, pair: tuple[Device, Device]) -> None:
    text = pair[0].invitation().strip()
    changed = text[:200] + ("A" if text[200] != "A" else "B") + text[201:]
    for wrong, complaint in (
        (text[:-100], "the invitation is cut off"),
        (changed, "the invitation was changed on its way"),
        ("hello", "this is no invitation"),
    ):
        done = alone("cluster", "join", wrong)
        assert done.code == 2
        assert complaint in done.err
        assert "copy the whole text that `edgert cluster invite` printed" in done.err
    assert "no invitation on standard input" in alone("cluster", "join", "-").err
    done = alone("cluster", "join", "--json", "hello")
    assert json.loads(done.out)["error"]["code"] == "invalid_request"


def test_a_used_or_expired_invitation_is_refused(alone: Device, pair: tuple[Device, Device]) -> None:
    anna, berta = pair
    expired = anna.invitation("--valid", "0.01s")
    done = alone.join(expired)
    assert done.code == 11
    assert re.search(r"expired \d+ s ago", done.err)
    assert "make a new one with `edgert cluster invite`" in done.err
    text = anna.invitation()
    done = berta.join(text)
    assert done.code == 2
    assert "in a cluster already, as berta" in done.err
    alone.join(text)
    alone.ok("cluster", "leave")
    done = alone.join(text)
    assert done.code == 11
    assert "was used already, by carl" in done.err


def test_an_inviting_device_that_is_down_is_told(alone: Device, tmp_path: Path) -> None:
    founder = Device(tmp_path, "dora")
    done = alone.join(founder.invitation())
    assert done.code == 10
    assert f"nothing listens at {founder.address}" in done.err


# --- without a cluster, without a daemon ------------------------------------------------------


@pytest.mark.parametrize("verb", ["status", "plan", "bench"])
def test_without_a_daemon_it_says_how_to_start_one(alone: Device, verb: str) -> None:
    done = alone("cluster", verb)
    assert done.code == 10
    assert "`edgert serve` starts one" in done.err


def test_without_a_cluster_it_says_how_to_begin_one(alone: Device, demo_model: Path) -> None:
    with alone.serving():
        for verb in ("status", "plan", "bench"):
            done = alone("cluster", verb)
            assert done.code == 2
            assert "`edgert cluster invite` founds one" in done.err
        for words in (("leave",), ("remove", "somebody")):
            done = alone("cluster", *words)
            assert done.code == 2
            assert "this device is in no cluster" in done.err
        # A running daemon takes part at once.
        done = alone.ok("cluster", "invite", "--name", "carl")
        assert "takes part now" in done.err
        shown = alone.ok("cluster", "status").out
        assert shown.startswith("carl · founder of this cluster · 1 member\n")
        assert "`edgert cluster invite` lets another device join" in shown
        assert "No model is in memory" in shown
        done = alone("cluster", "plan")
        assert (done.code, "edgert run --model NAME" in done.err) == (2, True)


def test_a_daemon_that_cannot_take_part_is_told(alone: Device, pair: tuple[Device, Device]) -> None:
    busy = {"EDGERT_CLUSTER_LISTEN": pair[0].address}
    taken = Device(alone.home.parent, "emil", EDGERT_MODEL_PRELOAD="false", **busy)
    with taken.serving():
        done = taken("cluster", "invite", "--name", "emil")
        assert "does not take part; `edgert logs` says why" in done.err
        done = taken("cluster", "status")
        assert done.code == 10
        assert "this device is emil in a cluster, but the running daemon" in done.err


def test_a_cluster_joined_while_the_daemon_starts_is_noticed(alone: Device) -> None:
    """Founded in the moment before the daemon says where it listens, when nobody can tell it yet."""
    code = (
        "from edge_runtime.cli import main\n"
        "from edge_runtime.cli.cluster.daemon_part import have_daemon_look\n"
        "from edge_runtime.cluster.authority import found_cluster\n"
        "from edge_runtime.daemon.runtime_file import RuntimeFile\n"
        "from edge_runtime.model_store.paths import home\n"
        "write = RuntimeFile.write\n"
        "def late(self, **facts):\n"
        f"    found_cluster(home(), 'carl', {alone.address!r})\n"
        "    print(have_daemon_look(home(), 'carl'), flush=True)\n"
        "    return write(self, **facts)\n"
        "RuntimeFile.write = late\n"
        "main(['serve'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=alone.environment(), cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert b"is starting; it takes part as soon as it is ready" in process.stdout.readline()
        wait_until(lambda: alone("cluster", "status").code == 0)
        assert alone.states() == {"carl": "here"}
    finally:
        process.kill()
        process.communicate()


def test_a_calibration_of_another_model_does_not_keep_the_cluster_from_a_model(
    alone: Device, tiny_model: Path, demo_model: Path
) -> None:
    alone.ok("models", "import", str(tiny_model), "--name", "tiny")
    calibration = demo_model.with_suffix(".calibration.npz")
    shutil.copy(calibration, alone.home / "models" / "tiny.calibration.npz")
    alone.ok("cluster", "invite", "--name", "carl")
    with alone.serving():
        alone.ok("run", "--model", "tiny", "--raw", "--max-tokens", "2", "THE CAT")
        (model,) = alone.cluster()["models"]
        assert (model["model"], model["calibrated"]) == ("tiny", False)
    assert "is not of the model" in alone.log.read_text()


def test_discovery_without_its_extra_says_how_to_install_it(alone: Device, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "zeroconf"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('none', name='zeroconf')\n")
    alone.ok("cluster", "invite", "--name", "carl")
    settings = {"PYTHONPATH": str(hidden.parent), "EDGERT_CLUSTER_DISCOVERY": "true"}
    done = alone("serve", environment=settings)
    assert done.code == 7
    assert 'pip install "edge-runtime[discovery]"' in done.err
    assert "Traceback" not in done.err
    assert "never awaited" not in done.err


# --- going ------------------------------------------------------------------------------------


def test_leaving_and_removing(tmp_path: Path, demo_model: Path) -> None:
    idle = {"EDGERT_MODEL_PRELOAD": "false"}
    dora, emil, fritz = (Device(tmp_path, name, **idle) for name in ("dora", "emil", "fritz"))
    with dora.serving(), ExitStack() as others:
        for device in (emil, fritz):
            others.enter_context(device.serving())
            assert device.join(dora.invitation()).code == 0
        wait_until(lambda: set(dora.states().values()) == {"here", "idle"}, 60)
        done = dora("cluster", "leave")
        assert done.code == 11
        assert "emil, fritz could take nobody in" in done.err
        done = emil.ok("cluster", "leave")
        assert done.out == "emil has left the cluster.\n"
        assert "works alone now" in done.err
        assert emil("cluster", "status").code == 2
        wait_until(lambda: set(dora.states()) == {"dora", "fritz"})
        others.close()  # fritz is lost
        assert dora("cluster", "remove", "nobody").code == 2
        assert dora.ok("cluster", "remove", "fritz").out == "fritz is no member any more.\n"
        wait_until(lambda: set(dora.states()) == {"dora"})
        done = fritz.ok("cluster", "leave")  # he learns there that he was out already
        assert done.out == "fritz has left the cluster.\n"
        assert dora.ok("cluster", "leave").out == "dora has left the cluster.\n"
