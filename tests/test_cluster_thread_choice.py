"""How many threads compute shares, judged by how long each number of them takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.cluster import thread_choice
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.backend import default_threads
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from models.synthetic import SyntheticModel, write_synthetic_gguf


@pytest.fixture
def slices(tmp_path: Path) -> GroupSlices:
    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, SyntheticModel(n_layers=1, n_embd=64, n_ff=160, n_vocab=300))
    gguf = GGUFFile(path)
    return GroupSlices(gguf, read_hyperparameters(gguf), 32)


def test_it_is_measured_on_the_model_itself(slices: GroupSlices) -> None:
    assert thread_choice.fastest_threads(slices, 8) in (1, default_threads())


@pytest.mark.parametrize(
    ("cores", "seconds", "chosen"),
    [
        (4, {1: 0.009, 4: 0.004}, 4),
        (2, {1: 0.009, 2: 0.028}, 1),  # somebody else has one of the two cores
        (2, {1: 0.009, 2: 0.0088}, 1),  # hardly faster: the other core is of more use to others
        (1, {}, 1),
    ],
)
def test_several_threads_are_taken_where_they_are_clearly_faster(
    slices: GroupSlices,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    seconds: dict[int, float],
    chosen: int,
) -> None:
    monkeypatch.setattr(thread_choice, "default_threads", lambda: cores)
    monkeypatch.setattr(thread_choice, "_seconds", lambda slices, n_rows, threads: seconds[threads])
    assert thread_choice.fastest_threads(slices, 8) == chosen
