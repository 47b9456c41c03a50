"""``edgert bench engine`` measures in processes of its own."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from program import Program


def test_every_thread_count_has_its_run(edgert: Program, tiny_model: Path) -> None:
    started = time.monotonic()
    done = edgert(
        "bench", "engine", "-m", tiny_model, "-t", "1,2", "--prefill", "32,64", "--decode", "8", "--json"
    )
    assert done.code == 0, done.err
    elapsed = time.monotonic() - started
    runs = done.json["runs"]
    assert sum(run["first_token_seconds"] for run in runs) < elapsed
    assert [run["threads"] for run in runs] == [1, 2]
    for run in runs:
        assert set(run["prefill"]) == {"32", "64"}
        assert run["decode"] > 0
        assert run["first_token_seconds"] > run["load_seconds"] > 0
        assert run["peak_bytes"] > tiny_model.stat().st_size


def test_prompt_that_the_context_cannot_hold_is_left_out(edgert: Program, tiny_model: Path) -> None:
    done = edgert("bench", "engine", "-m", tiny_model, "-t", "1", "--prefill", "64,512", "--decode", "8")
    assert done.code == 0, done.err
    title, header, row = done.out.splitlines()
    assert "llama" in title
    assert header.split() == [
        "THREADS",
        "PREFILL",
        "64",
        "DECODE",
        "LOAD",
        "FIRST",
        "TOKEN",
        "PEAK",
        "MEMORY",
    ]
    assert row.split()[0] == "1"
    assert "left out: 512 tokens" in done.err


def test_wrong_list_of_numbers_is_an_error(edgert: Program, tiny_model: Path) -> None:
    for wrong in ("1,x", "0", "-1", ""):
        assert edgert("bench", "engine", "-m", tiny_model, "-t", wrong).code == 2
    assert edgert("bench", "engine", "-m", tiny_model, "-t", "9999").code == 2


def test_error_of_the_measuring_process_is_shown(edgert: Program, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
    model.write_bytes(model.read_bytes()[:-100])
    done = edgert("bench", "engine", "-m", model)
    assert done.code == 3
    assert "Traceback" not in done.err
