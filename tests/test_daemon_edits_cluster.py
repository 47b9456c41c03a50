"""Edits of a model that is spread over several devices."""

from __future__ import annotations

from pathlib import Path

from cluster_devices import Device
from edit_requests import BEFORE, PROMPT, QUICK, answer
from program import wait_until

from edge_runtime.client import Client

# The demo model takes 5.7 MB: with 3 MB its owner needs both of the others, who lend 2 MB each.
LITTLE = {"EDGERT_CLUSTER_MEMORY_MB": "3"}
LENT = {"EDGERT_CLUSTER_LEND_MEMORY_MB": "2"}


def test_the_owner_edits_it_from_its_file_and_all_answer_with_the_edit(
    tmp_path: Path, demo_model: Path
) -> None:
    anna = Device(tmp_path, "anna", **LITTLE)
    others = [Device(tmp_path, name, **LENT) for name in ("berta", "carl")]
    with anna.serving() as running, others[0].serving(), others[1].serving():
        for one in others:
            assert one.join(anna.invitation()).code == 0
        wait_until(lambda: list(anna.states().values()).count("works") == 2, 60)
        with Client(running.grpc_target) as client:
            assert answer(client) == BEFORE
            edit = client.edits.apply(*QUICK.texts).result()
            assert edit.state == "applied"
            assert answer(client) == QUICK.target
            assert answer(client, mode="relaxed") == QUICK.target
            assert [edit.name for edit in client.edits.evaluate()] == [edit.name]
            assert client.generate(PROMPT, temperature=0, max_tokens=8).text()
            report = anna.cluster()["models"][0]
            assert report["on_time"] > report["recomputed"], "the others compute with the edit"
            client.edits.revert(edit.name)
            assert answer(client) == BEFORE
