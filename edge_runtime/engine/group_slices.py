"""What other devices need of a model: its shape, and the bytes of single neuron groups and head slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.architecture import MULTIPLIED_TYPES, Hyperparameters
from edge_runtime.engine.gguf import GGUFFile
from edge_runtime.engine.neuron_groups import default_group_size
from edge_runtime.engine.tensor_types import GGML_TYPES
from edge_runtime.engine.weights import EMBEDDING, HEAD, INTERLEAVED
from edge_runtime.errors import ModelFileError, RequestError, UnsupportedModelError

HEAD_SLICE_ROWS = 1024
_MAX_WIDTH = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_VOCABULARY = 1 << 24
_FFN = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True)
class PartitionShape:
    """Everything that a worker must know of a model whose neuron groups it computes.

    Attributes:
        n_ff: hidden neurons of a layer's FFN.
        group_size: neurons in a group; the last group may be shorter.
        types: ggml types of gate, up and down, for each layer.
        head_type: ggml type of the LM head.
        head_slice_rows: rows of the head in a slice; the last slice may be shorter.

    Raises:
        ModelFileError: a number out of range, or widths that the types' blocks do not divide.
    """

    architecture: str
    n_embd: int
    n_ff: int
    n_layers: int
    n_vocab: int
    group_size: int
    types: tuple[tuple[int, int, int], ...]
    head_type: int
    head_slice_rows: int = HEAD_SLICE_ROWS

    def __post_init__(self) -> None:
        bounds = {"n_embd": _MAX_WIDTH, "n_ff": _MAX_WIDTH, "n_layers": _MAX_LAYERS}
        bounds |= {"n_vocab": _MAX_VOCABULARY, "group_size": self.n_ff, "head_slice_rows": _MAX_VOCABULARY}
        for name, most in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ModelFileError(f"shape of a partition: {name} = {value!r}; possible is 1 to {most}")
        if len(self.types) != self.n_layers or any(len(types) != 3 for types in self.types):
            raise ModelFileError(
                f"shape of a partition: types of {len(self.types)} of {self.n_layers} layers"
            )
        last = self.neurons(self.n_groups - 1)
        for gate, up, down in set(self.types):
            for type_, width in (
                (gate, self.n_embd),
                (up, self.n_embd),
                (down, self.group_size),
                (down, last),
            ):
                _check_width(type_, width)
        _check_width(self.head_type, self.n_embd)

    @property
    def n_groups(self) -> int:
        """Groups of a layer."""
        return -(-self.n_ff // self.group_size)

    @property
    def n_head_slices(self) -> int:
        """Slices of the head."""
        return -(-self.n_vocab // self.head_slice_rows)

    def neurons(self, group: int) -> int:
        """Hidden neurons in a group."""
        return min(self.group_size, self.n_ff - group * self.group_size)

    def matrix_bytes(self, layer: int, group: int) -> tuple[int, int, int]:
        """Bytes of a group's gate rows, up rows and down columns."""
        neurons = self.neurons(group)
        gate, up, down = (GGML_TYPES[type_] for type_ in self.types[layer])
        return (
            neurons * (self.n_embd // gate.block_size) * gate.block_bytes,
            neurons * (self.n_embd // up.block_size) * up.block_bytes,
            self.n_embd * (neurons // down.block_size) * down.block_bytes,
        )

    def group_bytes(self, layer: int, group: int) -> int:
        """Bytes of a group."""
        return sum(self.matrix_bytes(layer, group))

    def slice_rows(self, number: int) -> int:
        """Rows of the vocabulary in a slice of the head."""
        return min(self.head_slice_rows, self.n_vocab - number * self.head_slice_rows)

    def head_slice_bytes(self, number: int) -> int:
        """Bytes of a slice of the head."""
        kind = GGML_TYPES[self.head_type]
        return self.slice_rows(number) * (self.n_embd // kind.block_size) * kind.block_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "types"} | {
            "types": [list(types) for types in self.types]
        }

    @classmethod
    def from_json(cls, values: object) -> PartitionShape:
        """Read what `as_json` wrote; nothing in it is trusted.

        Raises:
            ModelFileError: something is missing, too much, of a wrong kind or out of range.
        """
        if not isinstance(values, Mapping) or set(values) != set(cls.__slots__):
            raise ModelFileError(f"shape of a partition: needed are exactly {', '.join(cls.__slots__)}")
        types, name = values["types"], values["architecture"]
        if not isinstance(types, list) or not isinstance(name, str) or len(name) > 64:
            raise ModelFileError("shape of a partition: a list of types and a short name are needed")
        rows = [tuple(row) if isinstance(row, list) else () for row in types]
        if any(type(number) is not int for number in (values["head_type"], *sum(rows, ()))):
            raise ModelFileError("shape of a partition: types are whole numbers")
        return cls(**{**values, "types": tuple(rows)})


def _check_width(type_: int, width: int) -> None:
    kind = GGML_TYPES.get(type_) if type_ in MULTIPLIED_TYPES else None
    if kind is None or width % kind.block_size:
        name = f"type {type_}" if kind is None else f"{kind.name} for a width of {width}"
        raise ModelFileError(f"shape of a partition: {name}, which cannot be cut")


class GroupSlices:
    """Reads single neuron groups and slices of the head out of a GGUF file.

    Args:
        group_size: neurons in a group; None chooses `neuron_groups.default_group_size`.

    Attributes:
        shape: what they are slices of.
        head_name: of the head's tensor; the embedding matrix where the head is tied to it.

    Raises:
        RequestError: a group size that the file's quantization does not allow.
        UnsupportedModelError: the model's FFN has biases.
    """

    def __init__(
        self, gguf: GGUFFile, hyperparameters: Hyperparameters, group_size: int | None = None
    ) -> None:
        hp = hyperparameters
        layers = range(hp.n_layers)
        for name in (f"blk.{layer}.{kind}.bias" for layer in layers for kind in _FFN):
            if name in gguf.tensors:
                raise UnsupportedModelError(f"{name}: an FFN with biases cannot be spread over devices")
        types = tuple(
            tuple(gguf.tensors[f"blk.{layer}.{kind}.weight"].type for kind in _FFN) for layer in layers
        )
        unit = max(INTERLEAVED, *(GGML_TYPES[type_].block_size for _, _, type_ in types))
        size = group_size or min(default_group_size(hp.n_ff, unit), hp.n_ff)
        if size < 1 or (size % unit and size != hp.n_ff):
            raise RequestError(f"neuron groups of {size} were asked for; this file needs multiples of {unit}")
        self._gguf = gguf
        self.head_name = HEAD if HEAD in gguf.tensors else EMBEDDING
        self.shape = PartitionShape(
            architecture=hp.architecture,
            n_embd=hp.n_embd,
            n_ff=hp.n_ff,
            n_layers=hp.n_layers,
            n_vocab=hp.n_vocab,
            group_size=size,
            types=types,  # type: ignore[arg-type]
            head_type=gguf.tensors[self.head_name].type,
        )

    def group(self, layer: int, group: int) -> bytes:
        """A group's gate rows, then its up rows, then its columns of down, as they lie in the file."""
        shape = self.shape
        start = group * shape.group_size
        parts = []
        for kind in _FFN[:2]:
            rows = self._rows(f"blk.{layer}.{kind}.weight", shape.n_ff)
            parts.append(rows[start : start + shape.neurons(group)].tobytes())
        down = GGML_TYPES[shape.types[layer][2]]
        columns = self._rows(f"blk.{layer}.ffn_down.weight", shape.n_embd)
        first, last = (
            neuron // down.block_size * down.block_bytes for neuron in (start, start + shape.neurons(group))
        )
        parts.append(columns[:, first:last].tobytes())
        return b"".join(parts)

    def head_slice(self, number: int) -> bytes:
        """A slice of the head's rows."""
        start = number * self.shape.head_slice_rows
        rows = self._rows(self.head_name, self.shape.n_vocab)
        return rows[start : start + self.shape.slice_rows(number)].tobytes()

    def _rows(self, name: str, n_rows: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._gguf.tensor_bytes(name), np.uint8).reshape(n_rows, -1)
