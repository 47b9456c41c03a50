"""Adapters on real daemons that compute one model together."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster_devices import Device
from demo_adapters import COUNT, PROMPT, WISHES, Strengths, changes, expected, identity, keep
from program import wait_until

from edge_runtime.client import Client
from edge_runtime.daemon.adapters import STORE_NAME
from edge_runtime.personalize.store import AdapterStore

ALL: Strengths = {"one": 1.0, "two": 1.0, "three": 1.0}
ANSWER = ("run", "--raw", "--temperature", "0", "--max-tokens", str(COUNT))
# The demo model takes 5.7 MB: with 3 MB its owner needs both of the others, who lend 2 MB each.
LITTLE = {"EDGERT_CLUSTER_MEMORY_MB": "3", "EDGERT_MODEL_SEQUENCES": "4"}
LENT = {"EDGERT_CLUSTER_LEND_MEMORY_MB": "2"}


@pytest.fixture
def devices(tmp_path: Path, demo_model: Path) -> Iterator[tuple[Device, Client, Device, ExitStack]]:
    """Anna, whose model is spread over all three, a client of hers, Berta, and what ends Berta's daemon."""
    anna = Device(tmp_path, "anna", **LITTLE)
    berta, carl = (Device(tmp_path, name, **LENT) for name in ("berta", "carl"))
    keep(AdapterStore(anna.home / STORE_NAME), *ALL)
    with anna.serving() as running, carl.serving(), ExitStack() as of_berta:
        of_berta.enter_context(berta.serving())
        for one in (berta, carl):
            joined = one.join(anna.invitation())
            assert joined.code == 0, joined.err
        wait_until(lambda: list(anna.states().values()).count("works") == 2, 60)
        with Client(running.grpc_target) as client:
            yield anna, client, berta, of_berta


def answer(anna: Device, wish: Strengths | None = None) -> str:
    choice = [] if wish is None else [f"--adapter={name}={strength}" for name, strength in wish.items()]
    done = anna.ok(*ANSWER, *(choice or ([] if wish is None else ["--no-adapters"])), PROMPT)
    return done.out.removesuffix("\n")


def test_answers_are_those_of_one_device_whatever_is_applied_and_whoever_is_there(
    devices: tuple[Device, Client, Device, ExitStack],
) -> None:
    anna, client, berta, of_berta = devices
    store = AdapterStore(anna.home / STORE_NAME)
    before = anna.cluster()["models"][0]
    assert answer(anna) == expected(ALL)
    with ThreadPoolExecutor(len(WISHES)) as threads:  # several in one batch
        assert list(threads.map(lambda wish: answer(anna, wish), WISHES)) == [
            expected(wish).removesuffix("\n") for wish in WISHES
        ]
    after = anna.cluster()["models"][0]
    came = after["on_time"] - before["on_time"]
    assert came > 10 * (after["recomputed"] - before["recomputed"])
    assert came > 6 * COUNT  # layers, of the longest answer alone

    assert "computes nothing with the adapters" not in anna.log.read_text()

    # What was begun goes on as it began, while others are answered without what was undone.
    running = client.generate(PROMPT, adapters=["one"], temperature=0.0, max_tokens=150)
    begun = next(running).text
    store.revert(store.get("one").id, {})
    assert answer(anna) != expected(ALL)
    assert running.usage is None
    assert begun + "".join(chunk.text for chunk in running) == " Grimsund" * 150
    assert anna("run", "--adapter", "one", PROMPT).code == 4
    store.import_adapter("again", "demo", identity(), changes()["one"], {})
    assert answer(anna, {"again": 1.0}) == expected({"one": 1.0})

    for name in ("two", "three"):
        store.revert(store.get(name).id, {})
    assert answer(anna) == expected({"one": 1.0})  # by its other name

    of_berta.close()  # she goes, and comes back without what she held
    assert answer(anna) == expected({"one": 1.0})
    with berta.serving():
        wait_until(lambda: anna.states()["berta"] == "works", 60)
        for strength in (1.0, 0.6):
            assert answer(anna, {"again": strength}) == expected({"one": strength})
        assert answer(anna, {}) == expected({})

    assert "is not asked any more" not in anna.log.read_text()
