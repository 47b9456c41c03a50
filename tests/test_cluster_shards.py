"""The manifest: what names a model's shards, and what a hostile one may not do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.cluster.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    build_manifest,
    load_manifest,
    parse_manifest,
)
from edge_runtime.engine.architecture import read_hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.group_slices import GroupSlices
from edge_runtime.errors import ModelFileError, RequestError


@pytest.fixture(scope="module")
def slices(demo_model: Path) -> Iterator[GroupSlices]:
    with GGUFFile(demo_model) as gguf:
        yield GroupSlices(gguf, read_hyperparameters(gguf), 96)


@pytest.fixture(scope="module")
def manifest(slices: GroupSlices) -> Manifest:
    return build_manifest(slices)


def changed(manifest: Manifest, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The manifest with a change, in canonical form again."""
    values = json.loads(manifest.content)
    change(values)
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def test_every_shard_is_named_by_its_bytes(manifest: Manifest, slices: GroupSlices) -> None:
    shards = manifest.shards()
    assert len(shards) == 6 * 8 + 3
    for layer, number, digest, size in shards:
        content = slices.head_slice(number) if layer == 6 else slices.group(layer, number)
        assert (hashlib.sha256(content).digest(), len(content)) == (digest, size)


def test_name_depends_on_the_bytes_and_the_cut_alone(
    manifest: Manifest, slices: GroupSlices, demo_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "another name.gguf"
    content = bytearray(demo_model.read_bytes())
    copy.write_bytes(content)
    with GGUFFile(copy) as gguf:
        hp = read_hyperparameters(gguf)
        assert build_manifest(GroupSlices(gguf, hp, 96)).model == manifest.model
        assert build_manifest(GroupSlices(gguf, hp, 64)).model != manifest.model
        down = gguf.tensors["blk.3.ffn_down.weight"]
    content[down.offset] ^= 1
    copy.write_bytes(content)
    with GGUFFile(copy) as gguf:
        other = build_manifest(GroupSlices(gguf, hp, 96))
    differing = [a for a, b in zip(manifest.shards(), other.shards(), strict=True) if a != b]
    assert [(shard.layer, shard.number) for shard in differing] == [(3, 0)]


def test_progress_ends_at_the_total(slices: GroupSlices, manifest: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    build_manifest(slices, lambda done, total: seen.append((done, total)))
    total = sum(shard.size for shard in manifest.shards())
    assert seen[-1] == (total, total)
    assert len(seen) == 51


def test_wanted_shards_come_in_the_order_of_layers_and_the_head_last(manifest: Manifest) -> None:
    found = manifest.shards({6: [2, 0], 4: {7, 1}, 0: [3], 5: ()})
    assert [(shard.layer, shard.number) for shard in found] == [(0, 3), (4, 1), (4, 7), (6, 0), (6, 2)]
    assert found[0].digest == manifest.groups[0][3]
    assert found[-1].digest == manifest.head[2]


@pytest.mark.parametrize("wanted", [{-1: [0]}, {7: [0]}, {0: [8]}, {0: [-1]}, {6: [3]}, {0: [1, 1]}])
def test_wanting_what_the_model_lacks_is_refused(manifest: Manifest, wanted: dict[int, list[int]]) -> None:
    with pytest.raises(RequestError):
        manifest.shards(wanted)


def test_manifest_survives_the_way_to_another_device(manifest: Manifest) -> None:
    parsed = parse_manifest(manifest.content)
    assert (parsed.shape, parsed.groups, parsed.head) == (manifest.shape, manifest.groups, manifest.head)
    assert parsed.model == manifest.model == hashlib.sha256(manifest.content).hexdigest()


@given(st.data())
def test_damaged_bytes_give_a_manifest_of_another_name_or_a_clear_error(
    manifest: Manifest, data: st.DataObject
) -> None:
    content = bytearray(manifest.content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        parsed = parse_manifest(bytes(content))
    except ModelFileError:
        return
    assert parsed.content == bytes(content)
    assert (parsed.model == manifest.model) == (bytes(content) == manifest.content)


@given(st.binary(max_size=200))
def test_noise_is_refused(content: bytes) -> None:
    with pytest.raises(ModelFileError):
        parse_manifest(content)


def _drop_a_layer(values: dict[str, Any]) -> None:
    values["groups"].pop()


def _shorten_a_row(values: dict[str, Any]) -> None:
    values["groups"][2] = values["groups"][2][:-64]


def _two_sizes(values: dict[str, Any]) -> None:
    values["head"] = values["head"][:128] + values["head"][:64]  # the last slice is shorter


def _spaces_in_digests(values: dict[str, Any]) -> None:
    values["head"] = values["head"][:-2] + "  "


def _many_layers(values: dict[str, Any]) -> None:
    values["shape"]["n_layers"] = 1 << 40


def _many_slices(values: dict[str, Any]) -> None:
    values["shape"] |= {"n_vocab": 1 << 24, "head_slice_rows": 1}


def _huge_groups(values: dict[str, Any]) -> None:
    values["shape"] |= {"n_ff": 1 << 20, "group_size": 1 << 17, "n_embd": 1 << 20}


def _no_shape(values: dict[str, Any]) -> None:
    values["shape"] = None


def _other_version(values: dict[str, Any]) -> None:
    values["version"] = True


def _more_fields(values: dict[str, Any]) -> None:
    values["more"] = 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_drop_a_layer, "groups of 6 layers"),
        (_shorten_a_row, "8 SHA-256 digests"),
        (_two_sizes, "two sizes"),
        (_spaces_in_digests, "3 SHA-256 digests"),
        (_many_layers, "n_layers"),
        (_many_slices, "larger neuron groups"),
        (_huge_groups, "smaller neuron groups"),
        (_no_shape, "shape of a partition"),
        (_other_version, "version True"),
        (_more_fields, "exactly the fields"),
    ],
)
def test_contradiction_is_refused(
    manifest: Manifest, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    with pytest.raises(ModelFileError, match=complaint):
        parse_manifest(changed(manifest, change))


def test_only_the_canonical_form_names_a_model(manifest: Manifest) -> None:
    text = manifest.content
    digest = manifest.head[0].hex().encode()
    others = [
        text + b"\n",
        json.dumps(json.loads(text), sort_keys=True).encode(),
        text.replace(digest, digest.upper()),
        text.replace(b'"version":1', b'"version":1,"version":1'),
    ]
    for other in others:
        with pytest.raises(ModelFileError, match="canonical form"):
            parse_manifest(other)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (bytes(MAX_MANIFEST_BYTES + 1), "at most"),
        (b"[" + b"[]," * 100_000 + b"[]]", "values"),
        (b"[" * 5000 + b"]" * 5000, "no JSON"),
        (b'{"version":' + b"9" * 10_000 + b"}", "no JSON"),
        (b'{"version":NaN}', "exactly the fields"),
        ('{"version":"ä"}'.encode(), "no JSON"),
    ],
)
def test_what_costs_more_than_it_is_worth_is_refused(content: bytes, complaint: str) -> None:
    with pytest.raises(ModelFileError, match=complaint):
        parse_manifest(content)


# --- kept manifests ---------------------------------------------------------------------------------


class Load:
    """Loads the manifest of a file, and counts how often it was hashed."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.hashed = 0

    def __call__(self) -> Manifest:
        with GGUFFile(self.path) as gguf:
            slices = GroupSlices(gguf, read_hyperparameters(gguf))
            return load_manifest(slices, self.path, self.folder, self._count)

    def _count(self, done: int, total: int) -> None:
        self.hashed += done == total


@pytest.fixture
def load(tiny_model: Path, tmp_path: Path) -> Load:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model.read_bytes())
    return Load(path, tmp_path / "manifests")


def test_file_is_hashed_once(load: Load) -> None:
    assert load().model == load().model
    assert load.hashed == 1


def test_changed_file_is_hashed_again(load: Load) -> None:
    load()
    os.utime(load.path, ns=(0, 0))
    load()
    assert load.hashed == 2


def test_damaged_kept_manifest_is_made_anew(load: Load) -> None:
    first = load()
    (kept,) = load.folder.glob("*.manifest")
    content = bytearray(kept.read_bytes())
    digit = content.index(b'"head":"') + 10
    content[digit] = ord("0") if content[digit] != ord("0") else ord("1")
    kept.write_bytes(content)
    assert load().model == first.model
    assert load.hashed == 2
    load()
    assert load.hashed == 2


def test_kept_manifests_do_not_pile_up(load: Load) -> None:
    for second in range(70):
        os.utime(load.path, (second, second))
        load()
    assert load.hashed == 70
    assert len(list(load.folder.glob("*.manifest"))) == 64
    load()
    assert load.hashed == 70


def test_manifest_is_made_where_none_can_be_kept(load: Load) -> None:
    load.folder.write_bytes(b"a file where the folder should be")
    assert load().model == load().model
    assert load.hashed == 2
