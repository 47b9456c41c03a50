"""``edgert models`` on real files and a real server."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from http_file_server import FileServer, ServedFile
from program import Program, wait_until


def test_empty_store_says_how_to_fill_it(edgert: Program, tmp_path: Path) -> None:
    done = edgert("models", "list")
    assert done.code == 0
    assert "demo" in done.out or "models pull" in done.out


def test_list_has_a_row_for_each_model(edgert: Program, tiny_model: Path) -> None:
    assert edgert("models", "import", tiny_model, "--name", "mine").code == 0
    done = edgert("models", "list")
    header, *rows = done.out.splitlines()
    assert header.split() == ["NAME", "ARCHITECTURE", "PARAMETERS", "WEIGHTS", "CONTEXT", "SIZE", "SOURCE"]
    (row,) = (row for row in rows if row.startswith("mine"))
    assert row.split()[1] == "llama"
    assert "F32" in row
    assert str(tiny_model) in row


def test_list_and_show_agree_as_json(edgert: Program, tiny_model: Path) -> None:
    edgert("models", "import", tiny_model, "--name", "mine")
    listed = {model["name"]: model for model in edgert("models", "list", "--json").json["models"]}["mine"]
    shown = edgert("models", "show", "mine", "--json").json
    assert {name: shown[name] for name in listed} == listed
    assert len(shown["sha256"]) == 64


def test_damaged_model_is_listed_as_such(edgert: Program, tiny_model: Path) -> None:
    edgert("models", "import", tiny_model, "--name", "mine", "--copy")
    path = edgert.home / "models" / "mine.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    done = edgert("models", "list")
    assert done.code == 0
    assert "damaged" in done.out
    shown = edgert("models", "show", "mine")
    assert shown.code == 3
    assert "Traceback" not in shown.err


def test_verify_finds_a_flipped_bit(edgert: Program, tiny_model: Path) -> None:
    edgert("models", "import", tiny_model, "--name", "mine", "--copy")
    assert "(verified)" in edgert("models", "show", "mine", "--verify").out
    path = edgert.home / "models" / "mine.gguf"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    done = edgert("models", "show", "mine", "--verify")
    assert done.code == 3
    assert "the file is damaged" in done.err


def test_show_takes_a_path(edgert: Program, tiny_model: Path) -> None:
    done = edgert("models", "show", tiny_model)
    assert done.code == 0
    assert "architecture   llama" in done.out
    assert "chat template  no" in done.out


def test_import_of_something_else_is_an_error(edgert: Program, tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<html>")
    assert edgert("models", "import", page).code == 3
    assert edgert("models", "import", tmp_path).code == 4
    assert edgert("models", "import", tmp_path / "absent.gguf").code == 4


def test_remove_needs_a_yes_where_nobody_can_be_asked(edgert: Program, tiny_model: Path) -> None:
    edgert("models", "import", tiny_model, "--name", "mine")
    refused = edgert("models", "rm", "mine")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert edgert("models", "rm", "mine", "--yes").code == 0
    assert edgert("models", "rm", "mine", "--yes").code == 4


def test_demo_model_cannot_be_removed(edgert: Program, demo_model: Path) -> None:
    done = edgert("models", "rm", "demo")
    assert done.code == 2
    assert demo_model.exists()


def test_pull_from_the_hub_survives_a_break(
    edgert: Program, tiny_model: Path, file_server: FileServer
) -> None:
    body = tiny_model.read_bytes()
    file_server.serve("/o/r/resolve/main/tiny.gguf", ServedFile(b"", redirect="/cdn"))
    file_server.serve("/cdn", ServedFile(body, cuts=[len(body) // 3, len(body) // 3]))
    done = edgert(
        "models", "pull", "hf:o/r/tiny.gguf", "--json", environment={"EDGERT_HUB": file_server.address}
    )
    assert done.code == 0
    assert done.json["name"] == "tiny"
    assert done.json["fetched"] is True
    assert Path(done.json["path"]).read_bytes() == body
    assert "trying again" in done.err
    assert [request.start > 0 for request in file_server.received if request.path == "/cdn"] == [
        False,
        True,
        True,
    ]


def test_pull_that_was_killed_goes_on(edgert: Program, tiny_model: Path, file_server: FileServer) -> None:
    body = tiny_model.read_bytes()
    url = file_server.serve("/tiny.gguf", ServedFile(body, stall_after=len(body) // 2))
    with subprocess.Popen(
        edgert.command("models", "pull", url), env=edgert.environment(), stderr=subprocess.DEVNULL
    ) as process:
        file_server.stalled.wait(30)
        wait_until(lambda: list(edgert.home.glob("downloads/*.json")))
        process.send_signal(signal.SIGKILL)
    file_server.files["/tiny.gguf"].stall_after = None
    file_server.received.clear()
    done = edgert("models", "pull", url)
    assert done.code == 0, done.err
    assert file_server.received[0].start > 0
    assert (edgert.home / "models" / "tiny.gguf").read_bytes() == body


def test_pull_that_was_interrupted_goes_on(
    edgert: Program, tiny_model: Path, file_server: FileServer
) -> None:
    body = tiny_model.read_bytes()
    url = file_server.serve("/tiny.gguf", ServedFile(body, stall_after=len(body) // 2))
    with subprocess.Popen(
        edgert.command("models", "pull", url), env=edgert.environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        file_server.stalled.wait(30)
        wait_until(lambda: list(edgert.home.glob("downloads/*.json")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    file_server.files["/tiny.gguf"].stall_after = None
    file_server.received.clear()
    assert edgert("models", "pull", url).code == 0
    assert file_server.received[0].start > 0


def test_second_pull_at_the_same_time_is_refused(
    edgert: Program, tiny_model: Path, file_server: FileServer
) -> None:
    url = file_server.serve("/tiny.gguf", ServedFile(tiny_model.read_bytes(), stall_after=1000))
    with subprocess.Popen(
        edgert.command("models", "pull", url), env=edgert.environment(), stderr=subprocess.DEVNULL
    ) as process:
        file_server.stalled.wait(30)
        done = edgert("models", "pull", url)
        process.kill()
    assert done.code == 5
    assert "another process is fetching" in done.err


def test_pull_offline_is_refused_unless_it_is_here(
    edgert: Program, tiny_model: Path, file_server: FileServer
) -> None:
    url = file_server.serve("/tiny.gguf", ServedFile(tiny_model.read_bytes()))
    assert edgert("models", "pull", url, "--offline").code == 5
    assert edgert("models", "pull", url, environment={"EDGERT_OFFLINE": "1"}).code == 5
    assert edgert("models", "pull", url).code == 0
    file_server.received.clear()
    done = edgert("models", "pull", url, "--offline", "--json")
    assert done.code == 0
    assert done.json["fetched"] is False
    assert file_server.received == []


def test_pull_with_a_wrong_hash_stores_nothing(
    edgert: Program, tiny_model: Path, file_server: FileServer
) -> None:
    url = file_server.serve("/tiny.gguf", ServedFile(tiny_model.read_bytes()))
    assert edgert("models", "pull", url, "--sha256", "0" * 64).code == 5
    assert not list(edgert.home.rglob("*.gguf"))
