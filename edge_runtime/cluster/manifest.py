"""The list of a model's shards: which bytes each neuron group and each slice of the head consists of.

A shard is named by the SHA-256 of its bytes, so it can come from anywhere. A manifest is JSON in one
canonical form, and the SHA-256 of that names the model: devices that have the same GGUF, cut in the same
way, know the model by the same name without having spoken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edge_runtime.engine.group_slices import GroupSlices, PartitionShape
from edge_runtime.errors import ModelFileError, RequestError
from edge_runtime.model_store.files import exclusive
from edge_runtime.private_files import write_file

DIGEST_BYTES = 32
MAX_MANIFEST_BYTES = 8 << 20  # 120,000 shards; a model of 80 layers with 64 groups each has some 5,300
MAX_SHARD_BYTES = 1 << 30  # a shard is held in memory as a whole
_VERSION = 1
# Values in the JSON text beside the digests, which are one string for each layer: three types a layer and
# some twenty fields. Without this bound, a list of empty lists takes twenty times its bytes in memory.
_MAX_VALUES = 1 << 13
_CACHED_MANIFESTS = 64

Wanted = Mapping[int, Collection[int]]
"""Layer -> numbers of neuron groups; the number of layers -> numbers of slices of the head."""


class Shard(NamedTuple):
    """A shard of a model.

    Attributes:
        layer: the number of layers stands for the head.
        number: of the neuron group or of the slice.
        digest: SHA-256 of its bytes.
        size: in bytes.
    """

    layer: int
    number: int
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """All shards of a model. Made by `build_manifest` and `parse_manifest`.

    Attributes:
        shape: how the model is cut.
        groups: digests, [layer][group].
        head: digests of the head's slices.
        content: the canonical JSON text.
        model: hexadecimal SHA-256 of `content`.
    """

    shape: PartitionShape
    groups: tuple[tuple[bytes, ...], ...]
    head: tuple[bytes, ...]
    content: bytes
    model: str

    def shard(self, layer: int, number: int) -> Shard:
        """One shard.

        Raises:
            RequestError: the model has no such layer, group or slice.
        """
        shape = self.shape
        if not 0 <= layer <= shape.n_layers:
            raise RequestError(f"layer {layer} was asked for; the model has 0 to {shape.n_layers} (its head)")
        digests = self.head if layer == shape.n_layers else self.groups[layer]
        if not 0 <= number < len(digests):
            what = "slice of the head" if layer == shape.n_layers else f"neuron group of layer {layer}"
            raise RequestError(f"{what} {number} was asked for; there are 0 to {len(digests) - 1}")
        return Shard(layer, number, digests[number], _size(shape, layer, number))

    def shards(self, wanted: Wanted | None = None) -> list[Shard]:
        """Shards in the order of layers, the head last; all of the model without `wanted`.

        Raises:
            RequestError: `wanted` names one that the model does not have, or one twice.
        """
        if wanted is None:
            wanted = _everything(self.shape)
        found = []
        for layer in sorted(wanted):
            numbers = sorted(wanted[layer])
            if len(set(numbers)) < len(numbers):
                raise RequestError(f"layer {layer}: a neuron group or slice was asked for twice")
            found += [self.shard(layer, number) for number in numbers]
        return found


def build_manifest(
    slices: GroupSlices, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """Hash every shard of a model; as fast as the file can be read and hashed.

    Args:
        progress: called with bytes hashed and bytes in all.

    Raises:
        ModelFileError: cut like this, the model has more or larger shards than a manifest may list.
    """
    shape = slices.shape
    _check_counts(shape)
    total = sum(_size(shape, layer, number) for layer, number in _positions(shape))
    done, digests = 0, []
    for layer, number in _positions(shape):
        content = slices.head_slice(number) if layer == shape.n_layers else slices.group(layer, number)
        digests.append(hashlib.sha256(content).digest())
        done += len(content)
        progress(done, total)
    return _assemble(shape, digests)


def parse_manifest(content: bytes) -> Manifest:
    """Read a manifest that came from another device; nothing in it is trusted.

    Raises:
        ModelFileError: it is too large, not in canonical form, or contradicts itself.
    """
    if len(content) > MAX_MANIFEST_BYTES:
        _refuse(f"it has {len(content)} bytes, at most {MAX_MANIFEST_BYTES} are read")
    n_values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > _MAX_VALUES:
        _refuse(f"it holds {n_values} values, at most {_MAX_VALUES} are read")
    try:
        values = json.loads(content.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            "manifest: it is no JSON text; the other device must send what it made"
        ) from error
    if not isinstance(values, dict) or set(values) != {"version", "shape", "groups", "head"}:
        _refuse("needed are exactly the fields version, shape, groups and head")
    if type(values["version"]) is not int or values["version"] != _VERSION:
        _refuse(
            f"version {str(values['version'])[:16]} is not {_VERSION}; use the same program on all devices"
        )
    shape = PartitionShape.from_json(values["shape"])
    _check_counts(shape)
    rows = values["groups"]
    if not isinstance(rows, list) or len(rows) != shape.n_layers:
        _refuse(f"it needs the groups of {shape.n_layers} layers")
    digests = [digest for row in rows for digest in _digests(row, shape.n_groups)]
    digests += _digests(values["head"], shape.n_head_slices)
    manifest = _assemble(shape, digests)
    if manifest.content != content:
        _refuse("it is not in canonical form, so its hash names nothing")
    sizes: dict[bytes, int] = {}
    for shard in manifest.shards():
        if sizes.setdefault(shard.digest, shard.size) != shard.size:
            _refuse(f"the shard {shard.digest.hex()[:16]} has two sizes")
    return manifest


def load_manifest(
    slices: GroupSlices,
    path: Path,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """The manifest of a GGUF, from an earlier call's file where the GGUF has not changed since.

    Args:
        slices: of the file at `path`.
        folder: where manifests are kept.

    Raises:
        ModelFileError: as `build_manifest`.
    """
    found = path.stat()
    key = f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}\0{slices.shape}\0{_VERSION}"
    kept = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.manifest"
    manifest = _read_kept(kept, slices.shape)
    if manifest is not None:
        return manifest
    manifest = build_manifest(slices, progress)
    now = path.stat()
    # A file that is being replaced would leave a manifest that fits neither version.
    if (now.st_size, now.st_mtime_ns) == (found.st_size, found.st_mtime_ns):
        with suppress(OSError):  # a full disk costs the hashing anew, no more
            _keep(kept, manifest)
    return manifest


def _read_kept(path: Path, shape: PartitionShape) -> Manifest | None:
    """None where there is none, or where the disk has damaged it."""
    try:
        with path.open("rb") as file:
            model, _, content = file.read(MAX_MANIFEST_BYTES + 128).partition(b"\n")
        manifest = parse_manifest(content)
    except (OSError, ModelFileError):
        return None
    return manifest if manifest.model.encode() == model and manifest.shape == shape else None


def _keep(path: Path, manifest: Manifest) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent / "manifests.lock", wait=True):
        write_file(path, manifest.model.encode() + b"\n" + manifest.content, 0o644)
        kept = sorted(path.parent.glob("*.manifest"), key=lambda file: file.stat().st_mtime_ns)
        for oldest in kept[:-_CACHED_MANIFESTS]:
            oldest.unlink()


def _everything(shape: PartitionShape) -> dict[int, range]:
    groups = dict.fromkeys(range(shape.n_layers), range(shape.n_groups))
    return groups | {shape.n_layers: range(shape.n_head_slices)}


def _positions(shape: PartitionShape) -> Iterator[tuple[int, int]]:
    for layer, numbers in _everything(shape).items():
        for number in numbers:
            yield layer, number


def _size(shape: PartitionShape, layer: int, number: int) -> int:
    return shape.head_slice_bytes(number) if layer == shape.n_layers else shape.group_bytes(layer, number)


def _check_counts(shape: PartitionShape) -> None:
    """Refuse what would not fit into a manifest before a list of it is made."""
    n_shards = shape.n_layers * shape.n_groups + shape.n_head_slices
    if n_shards * 2 * DIGEST_BYTES > MAX_MANIFEST_BYTES:
        _refuse(
            f"{n_shards} shards are more than its {MAX_MANIFEST_BYTES} bytes can list; "
            "cut the model into larger neuron groups"
        )
    # The first group and slice are the largest of their layer.
    largest = max(_size(shape, layer, 0) for layer in range(shape.n_layers + 1))
    if largest > MAX_SHARD_BYTES:
        _refuse(
            f"a shard of {largest} bytes; at most {MAX_SHARD_BYTES} are taken: "
            "cut the model into smaller neuron groups"
        )


def _digests(text: Any, count: int) -> list[bytes]:
    """Digests that stand in one hexadecimal text."""
    if not isinstance(text, str) or len(text) != count * 2 * DIGEST_BYTES:
        _refuse(f"{count} SHA-256 digests in one hexadecimal text are needed")
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != count * DIGEST_BYTES:  # bytes.fromhex skips spaces
        _refuse(f"{count} SHA-256 digests in one hexadecimal text are needed")
    return [raw[start : start + DIGEST_BYTES] for start in range(0, len(raw), DIGEST_BYTES)]


def _assemble(shape: PartitionShape, digests: list[bytes]) -> Manifest:
    n_groups = shape.n_groups
    rows = [
        tuple(digests[start : start + n_groups]) for start in range(0, shape.n_layers * n_groups, n_groups)
    ]
    head = tuple(digests[shape.n_layers * n_groups :])
    values = {
        "version": _VERSION,
        "shape": shape.as_json(),
        "groups": [b"".join(row).hex() for row in rows],
        "head": b"".join(head).hex(),
    }
    content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode("ascii")
    if len(content) > MAX_MANIFEST_BYTES:
        _refuse(f"it would have {len(content)} bytes; cut the model into larger neuron groups")
    return Manifest(shape, tuple(rows), head, content, hashlib.sha256(content).hexdigest())


def _refuse(what: str) -> NoReturn:
    raise ModelFileError(f"manifest: {what}")
