"""Parts that several tests share: real models, a real home folder, a real server, the real program."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_file_server import FileServer
from program import REPOSITORY, Program

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the program has it; before numpy is loaded
DEMO_MODEL = REPOSITORY / "models" / "demo" / "edge-demo-q8_0.gguf"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Test data that is not part of this repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model of the source tree."""
    if not DEMO_MODEL.is_file():
        pytest.skip(f"no demo model at {DEMO_MODEL}; `make demo-model` trains it")
    return DEMO_MODEL


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model of random weights, about two megabytes, context 256, without a chat template."""
    from models.synthetic import SyntheticModel, write_synthetic_gguf

    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    model = SyntheticModel(
        architecture="llama",
        n_layers=2,
        n_embd=128,
        n_ff=256,
        n_head=4,
        n_head_kv=2,
        n_vocab=384,
        n_ctx=256,
        quantization="F32",
    )
    write_synthetic_gguf(path, model)
    return path


@pytest.fixture(autouse=True)
def _without_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean the same whatever the caller's environment says about the program."""
    for name in os.environ:
        if name.startswith(("EDGERT_", "HF_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Started in the background, a shell's children ignore SIGINT, and theirs would as well."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def edgert(tmp_path: Path) -> Program:
    """The program with a home folder of its own."""
    return Program(tmp_path / "home")


def _running(server: FileServer) -> Iterator[FileServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A server of its own for each test."""
    yield from _running(FileServer())


@pytest.fixture
def other_server() -> Iterator[FileServer]:
    """A second one."""
    yield from _running(FileServer())
