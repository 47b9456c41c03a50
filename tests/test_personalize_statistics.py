"""The statistics for edits beside a model: kept as they were measured, refused where anything is wrong."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.errors import EdgeRuntimeError, ModelFileError, RequestError, UnsupportedModelError
from edge_runtime.model_store.identity import model_identity
from edge_runtime.personalize.solve import KeyCovariance
from edge_runtime.personalize.statistics import (
    EditStatistics,
    load_statistics,
    save_statistics,
    statistics_path,
)
from edge_runtime.personalize.templates import Template
from models.synthetic import SyntheticModel, write_synthetic_gguf

N_FF = 128


def measured() -> EditStatistics:
    """Statistics with a different number in every place."""
    keys = np.random.default_rng(0).standard_normal((5, N_FF)).astype(np.float16)
    templates = (
        Template("{} lives in", (("Ann", "Oslo"), ("Bo Day", "São Paulo"))),
        Template("Where is {}?", (("Ann", "there"),)),
    )
    return EditStatistics(0, {0: 2.5, 1: 1.25}, keys, templates, (3.5, 7.0), ("One.", "Two."))


def write_model(path: Path, seed: int = 0, n_ff: int = N_FF) -> Path:
    write_synthetic_gguf(path, SyntheticModel(n_layers=2, n_embd=64, n_ff=n_ff, n_ctx=64, seed=seed))
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    with GGUFFile(write_model(tmp_path_factory.mktemp("statistics") / "model.gguf")) as gguf:
        yield gguf


@pytest.fixture(scope="module")
def sound(gguf: GGUFFile) -> bytes:
    return save_statistics(measured(), gguf).read_bytes()


def test_what_is_kept_is_what_was_measured(gguf: GGUFFile, sound: bytes) -> None:
    statistics_path(gguf.path).write_bytes(sound)
    assert statistics_path(gguf.path).name == "model.edits.npz"
    found, wanted = load_statistics(gguf), measured()
    for field in fields(EditStatistics):
        if field.name != "keys":
            assert getattr(found, field.name) == getattr(wanted, field.name)
    assert found.keys.dtype == np.float16
    np.testing.assert_array_equal(found.keys, wanted.keys)
    assert save_statistics(found, gguf).read_bytes() == sound


def test_a_model_without_them_says_what_to_do(tmp_path: Path) -> None:
    with (
        GGUFFile(write_model(tmp_path / "other.gguf")) as other,
        pytest.raises(RequestError, match=r"no statistics of other\.gguf yet .*run `edgert edits prepare`"),
    ):
        load_statistics(other)


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_ff": 2 * N_FF}])
def test_those_of_another_model_are_refused(
    gguf: GGUFFile, sound: bytes, tmp_path: Path, change: dict[str, int]
) -> None:
    """Of other weights in the same shape, too."""
    path = write_model(tmp_path / "other.gguf", **change)
    statistics_path(path).write_bytes(sound)
    with GGUFFile(path) as other, pytest.raises(ModelFileError, match=r"is not of the model .*edits prepare"):
        load_statistics(other)


def test_the_shipped_statistics_are_of_the_shipped_model(demo_model: Path) -> None:
    with GGUFFile(demo_model) as gguf:
        found = load_statistics(gguf)
        assert found.layer in range(5)
        assert len(found.keys) > 500
        assert len(found.templates) == len(found.usual) > 40
        assert found.sentences
        with zipfile.ZipFile(statistics_path(demo_model)) as archive:
            meta = json.loads(np.load(io.BytesIO(archive.read("meta.npy"))).tobytes())
        assert meta["model"] == model_identity(gguf)
        KeyCovariance(found.keys)


# --- hostile files ----------------------------------------------------------------------------


def arrays_of(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return dict(file)


def with_meta(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another description."""
    arrays = arrays_of(content)
    meta = json.loads(arrays["meta"].tobytes())
    change(meta)
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def with_keys(content: bytes, keys: Any) -> bytes:
    target = io.BytesIO()
    np.savez(target, **{**arrays_of(content), "keys": keys})
    return target.getvalue()


def load(gguf: GGUFFile, content: bytes) -> EditStatistics:
    statistics_path(gguf.path).write_bytes(content)
    return load_statistics(gguf)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "the last layer": (lambda meta: meta.update(layer=1), "layer 1 .* out of range"),
    "a negative layer": (lambda meta: meta.update(layer=-1), "out of range"),
    "no samples": (lambda meta: meta.update(n_samples=0), "out of range"),
    "too many samples": (lambda meta: meta.update(n_samples=1 << 30), "out of range"),
    "other samples": (lambda meta: meta.update(n_samples=6), r"keys"),
    "a layer that is no number": (lambda meta: meta.update(layer=False), "wrong kind"),
    "something missing": (lambda meta: meta.pop("usual"), "lacks something"),
    "something more": (lambda meta: meta.update(more=1), "too much"),
    "a value short": (lambda meta: meta.update(usual=[1.0]), "2 sentences, 1 values"),
    "values that are none": (lambda meta: meta.update(usual=["a", "b"]), "edits prepare"),
    "values that are not finite": (lambda meta: meta.update(usual=[float("nan"), 1.0]), "finite"),
    "templates of another form": (lambda meta: meta.update(templates=[1, 2]), "edits prepare"),
    "sightings of another form": (
        lambda meta: meta.update(templates=[["{}", [["a"]]], ["{}", []]]),
        "edits prepare",
    ),
    "a template without a place": (
        lambda meta: meta.update(templates=[["x", []], ["{}", []]]),
        "no place for a name",
    ),
    "losses of another form": (lambda meta: meta.update(layer_losses=[[0]]), "edits prepare"),
    "a loss beyond all numbers": (
        lambda meta: meta.update(layer_losses=[[float("inf"), 1.0]]),
        "edits prepare",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_descriptions_are_refused(gguf: GGUFFile, sound: bytes, name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(ModelFileError, match=message):
        load(gguf, with_meta(sound, change))


def test_another_version_is_named(gguf: GGUFFile, sound: bytes) -> None:
    with pytest.raises(UnsupportedModelError, match="has version 2, this program reads 1; make it anew"):
        load(gguf, with_meta(sound, lambda meta: meta.update(version=2)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.ones((5, N_FF), np.float32), "needed is"),
        (np.ones((5, N_FF - 1), np.float16), "needed is"),
        (np.full((5, N_FF), np.nan, np.float16), "not finite"),
        (np.zeros((5, N_FF), np.float16), "are all zero"),
        (np.array([{}]), "keys"),
    ],
    ids=["float32", "narrow", "nan", "zero", "objects"],
)
def test_wrong_keys_are_refused(gguf: GGUFFile, sound: bytes, keys: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        load(gguf, with_keys(sound, keys))


@pytest.mark.parametrize("cut", [0, 1, 10, 100, -1, -20, -100])
def test_a_part_of_a_file_is_refused(gguf: GGUFFile, sound: bytes, cut: int) -> None:
    with pytest.raises(ModelFileError, match="edits prepare"):
        load(gguf, sound[:cut])


def test_a_folder_in_their_place_is_as_none(gguf: GGUFFile, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(gguf.path, path)
    statistics_path(path).mkdir()
    with GGUFFile(path) as other, pytest.raises(RequestError, match="no statistics"):
        load_statistics(other)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    stored=st.booleans(),
)
@example(changes=[(8, 99)], stored=True)
def test_damaged_bytes_are_refused_or_harmless(
    gguf: GGUFFile, sound: bytes, changes: list[tuple[int, int]], stored: bool
) -> None:
    """`stored`: with the sums of the archive made good again, so that the damage goes deeper."""
    content = bytearray(with_meta(sound, lambda meta: None) if stored else sound)
    for place, value in changes:
        content[place % len(content)] = value
    if stored:
        content = bytearray(with_right_sums(bytes(content)))
    try:
        found = load(gguf, bytes(content))
    except EdgeRuntimeError as error:
        assert len(str(error)) < 1000
        return
    assert found.layer == 0
    assert np.isfinite(found.keys).all() and found.keys.any()
    KeyCovariance(found.keys)


def with_right_sums(content: bytes) -> bytes:
    """Members of a stored archive, with the checksums that their bytes have now."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {
                one.filename: content[start : start + one.file_size]
                for one in archive.infolist()
                for start in [
                    one.header_offset + 30 + sum(struct.unpack_from("<HH", content, one.header_offset + 26))
                ]
            }
    except (zipfile.BadZipFile, struct.error, OverflowError, NotImplementedError, ValueError):
        return content
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return target.getvalue()
