"""The calibration beside a model: kept as it was measured, and refused where anything is wrong with it."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_runtime.cluster.calibration_file import (
    Calibration,
    calibration_path,
    find_calibration,
    load_calibration,
    save_calibration,
)
from edge_runtime.cluster.calibration_text import DOCUMENT_END
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import ModelFileError
from models.demo.paths import HELD_OUT_PATH, MODEL_PATH
from models.demo.write_calibration import calibration_text
from models.synthetic import SyntheticModel, write_synthetic_gguf
from scheduler.patience import Response, Rung

N_LAYERS, N_GROUPS, N_EMBD = 2, 4, 64


def measured() -> Calibration:
    """A calibration with a different number in every place."""
    rng = np.random.default_rng(0)
    shares = (0.5, 1.0)
    rungs = (Rung((1, 2), shares, (0.0, 0.0)), Rung((2,), shares, (0.25, 0.5)))
    late = np.array([[0.125], [np.inf]])
    return Calibration(
        group_size=32,
        importance=rng.random((N_LAYERS, N_GROUPS)).astype(np.float32),
        means=rng.normal(size=(N_LAYERS, N_GROUPS, N_EMBD)).astype(np.float16),
        fill="mean",
        response=Response(N_LAYERS, late, np.array([0.5, 2.0]), rungs),
        n_tokens=77,
        perplexity=1.5,
        divergences=np.array([[0.0, 0.0], [0.25, 0.375]]),
        increases=np.array([[0.0, 0.0], [0.2, 0.5]]),
    )


def write_model(path: Path, seed: int = 0, n_ff: int = N_GROUPS * 32) -> Path:
    shape = SyntheticModel(n_layers=N_LAYERS, n_embd=N_EMBD, n_ff=n_ff, n_ctx=64, seed=seed)
    write_synthetic_gguf(path, shape)
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    path = write_model(tmp_path_factory.mktemp("calibration") / "model.gguf")
    with GGUFFile(path) as gguf:
        save_calibration(measured(), gguf)
        yield gguf


@pytest.fixture(scope="module")
def sound(gguf: GGUFFile) -> bytes:
    return calibration_path(gguf.path).read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "model.calibration.npz"


def test_what_is_kept_is_what_was_measured(gguf: GGUFFile) -> None:
    assert calibration_path(gguf.path).name == "model.calibration.npz"
    found, wanted = find_calibration(gguf), measured()
    assert found is not None
    for name in ("importance", "means", "divergences", "increases"):
        kept = getattr(found, name)
        assert kept.dtype == getattr(wanted, name).dtype
        np.testing.assert_array_equal(kept, getattr(wanted, name))
    for name in ("group_size", "fill", "n_tokens", "perplexity"):
        assert getattr(found, name) == getattr(wanted, name)
    np.testing.assert_array_equal(found.response.late_cost, wanted.response.late_cost)
    np.testing.assert_array_equal(found.response.lost_cost, wanted.response.lost_cost)
    assert found.response.rungs == wanted.response.rungs


def test_the_same_measurement_gives_the_same_file(gguf: GGUFFile, sound: bytes) -> None:
    assert save_calibration(measured(), gguf).read_bytes() == sound


def test_a_model_without_one_has_none(tmp_path: Path) -> None:
    with GGUFFile(write_model(tmp_path / "other.gguf")) as gguf:
        assert find_calibration(gguf) is None


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_ff": 8 * 32}])
def test_that_of_another_model_is_refused(gguf: GGUFFile, tmp_path: Path, change: dict[str, int]) -> None:
    """Of other weights in the same shape, too."""
    path = write_model(tmp_path / "other.gguf", **change)
    shutil.copy(calibration_path(gguf.path), calibration_path(path))
    with GGUFFile(path) as other, pytest.raises(ModelFileError, match="is not of the model"):
        find_calibration(other)


# --- hostile files ----------------------------------------------------------------------------


def arrays_of(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return dict(file)


def written(arrays: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    np.savez_compressed(target, **arrays)
    return target.getvalue()


def with_meta(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        meta = json.loads(bytes(arrays["meta"])) | changes
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)

    return change


def with_array(name: str, values: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        if values is None:
            del arrays[name]
        else:
            arrays[name] = values

    return change


WRONG = {
    "no costs": with_array("lost_cost", None),
    "no meta": with_array("meta", None),
    "meta is no JSON": with_array("meta", np.frombuffer(b"{{{{", np.uint8)),
    "meta nests deeply": with_array("meta", np.frombuffer(b"[" * 50_000, np.uint8)),
    "meta is no object": with_array("meta", np.frombuffer(b"[1]", np.uint8)),
    "meta has no length": with_array("meta", np.array(1, np.uint8)),
    "meta is of numbers": with_array("meta", np.zeros(10)),
    "another field": with_meta(more=1),
    "version": with_meta(version=2),
    "version is true": with_meta(version=True),
    "model": with_meta(model="0" * 64),
    "group size of none": with_meta(group_size=0),
    "group size that the file does not allow": with_meta(group_size=31),
    "group size of another cut": with_meta(group_size=64),
    "fill": with_meta(fill="most"),
    "perplexity": with_meta(perplexity=float("nan")),
    "perplexity is text": with_meta(perplexity="1.5"),
    "no tokens": with_meta(n_tokens=0),
    "lateness": with_meta(n_late=10**9),
    "shares fall": with_meta(shares=[1.0, 0.5]),
    "shares beyond one": with_meta(shares=[0.5, 1.5]),
    "shares are text": with_meta(shares=["a", "b"]),
    "no shares": with_meta(shares=[]),
    "many shares": with_meta(shares=[0.1] * 1000),
    "syncs beyond the last layer": with_meta(syncs=[[1, 2], [3]]),
    "syncs are numbers": with_meta(syncs=[1, 2]),
    "syncs are broken": with_meta(syncs=[[1, 2], [2.5]]),
    "syncs are empty": with_meta(syncs=[[1, 2], []]),
    "one rung more": with_meta(syncs=[[1, 2], [2], [2]]),
    "importance of other layers": with_array("importance", np.zeros((3, N_GROUPS), np.float32)),
    "importance is wider": with_array("importance", np.zeros((N_LAYERS, N_GROUPS))),
    "importance lies the other way": with_array(
        "importance", np.asfortranarray(np.ones((N_LAYERS, N_GROUPS), np.float32))
    ),
    "importance is infinite": with_array("importance", np.full((N_LAYERS, N_GROUPS), np.inf, np.float32)),
    "means are no numbers": with_array("means", np.full((N_LAYERS, N_GROUPS, N_EMBD), np.nan, np.float16)),
    "late cost is no number": with_array("late_cost", np.full((N_LAYERS, 1), np.nan)),
    "lost cost is infinite": with_array("lost_cost", np.full(N_LAYERS, np.inf)),
    "increases are infinite": with_array("rungs", np.full((2, 2), np.inf)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused(gguf: GGUFFile, sound: bytes, damaged: Path, wrong: str) -> None:
    arrays = arrays_of(sound)
    WRONG[wrong](arrays)
    damaged.write_bytes(written(arrays))
    with pytest.raises(ModelFileError, match="edgert calibrate"):
        load_calibration(damaged, gguf)


def test_objects_are_never_unpickled(gguf: GGUFFile, sound: bytes, damaged: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    arrays = arrays_of(sound)
    arrays["lost_cost"] = np.array([Touch(), 1], object)
    damaged.write_bytes(written(arrays))
    with pytest.raises(ModelFileError):
        load_calibration(damaged, gguf)
    assert not (tmp_path / "touched").exists()


def test_large_arrays_are_refused_before_they_are_unpacked(
    gguf: GGUFFile, sound: bytes, damaged: Path
) -> None:
    """200 MB of zeros pack to 200 kB; a header can announce any shape."""
    for name, values in (("means", np.zeros(100_000_000, np.float16)), ("meta", np.zeros(10**8, np.uint8))):
        arrays = arrays_of(sound) | {name: values}
        damaged.write_bytes(written(arrays))
        with pytest.raises(ModelFileError, match=f"{name} has .* bytes"):
            load_calibration(damaged, gguf)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(io.BytesIO(sound)) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            target.writestr(name, header.getvalue() if name == "lost_cost.npy" else source.read(name))
    with pytest.raises(ModelFileError, match=r"lost_cost is .*1000000000000000"):
        load_calibration(damaged, gguf)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
@example([], 0.0)
def test_damaged_bytes_give_an_error_or_numbers_within_bounds(
    gguf: GGUFFile, sound: bytes, damaged: Path, changes: list[tuple[float, int]], length: float
) -> None:
    content = bytearray(sound)
    for place, value in changes:
        content[min(int(place * len(content)), len(content) - 1)] = value
    if length < 0.5:  # cut off
        del content[int(2 * length * len(content)) :]
    damaged.write_bytes(content)
    try:
        found = load_calibration(damaged, gguf)
    except ModelFileError:
        return
    assert found.importance.shape == (N_LAYERS, N_GROUPS)
    assert np.isfinite(found.means).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["meta", "importance", "means", "late_cost", "rungs"]),
    st.integers(0, 200),
    st.binary(min_size=1, max_size=4),
)
def test_damaged_arrays_give_an_error_or_numbers_within_bounds(
    gguf: GGUFFile, sound: bytes, damaged: Path, name: str, place: int, value: bytes
) -> None:
    """Behind the zip file's own checksums."""
    with zipfile.ZipFile(io.BytesIO(sound)) as source, zipfile.ZipFile(damaged, "w") as target:
        for member in source.namelist():
            content = bytearray(source.read(member))
            if member == f"{name}.npy":
                content[place : place + len(value)] = value
            target.writestr(member, content)
    try:
        found = load_calibration(damaged, gguf)
    except ModelFileError:
        return
    assert found.means.shape == (N_LAYERS, N_GROUPS, N_EMBD)
    assert np.isfinite(found.importance).all()


# --- the demo model's -------------------------------------------------------------------------


def test_the_demo_model_comes_with_one() -> None:
    with GGUFFile(MODEL_PATH) as gguf:
        found = find_calibration(gguf)
    assert found is not None
    assert calibration_path(MODEL_PATH).stat().st_size < 300_000
    assert found.importance.shape == (6, 24)
    assert found.n_tokens > 10_000
    rungs = {len(rung.syncs): rung for rung in found.response.rungs}
    assert sorted(rungs) == [1, 2, 3, 4, 5, 6]
    half = rungs[6].shares.index(0.5)
    # A few waits hold a quality of 0.99 with half of each layer elsewhere; one does not.
    assert rungs[2].increases[half] < 0.01 < rungs[1].increases[half]
    # The first and the last layer matter most.
    assert found.response.lost_cost.argsort()[-2:].tolist() == [0, 5]


def test_the_demo_model_is_calibrated_on_a_text_of_its_own() -> None:
    held_out = set(HELD_OUT_PATH.read_text(encoding="utf-8").splitlines())
    documents = calibration_text(n_documents=240, n_stories=30).split(DOCUMENT_END)
    assert not held_out.intersection(documents)
    assert len(documents) == 270
    assert calibration_text(n_documents=5, n_stories=2) == calibration_text(n_documents=5, n_stories=2)
    sentences = {sentence for story in held_out for sentence in story.split(". ")}
    shared = [s for document in documents for s in document.split(". ") if s in sentences and len(s) > 70]
    assert len(shared) <= 2  # short ones come from one grammar, long ones should not meet
