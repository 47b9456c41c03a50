"""What is asked of a model in one step, and what comes back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.engine.adapters import AdapterBank
from edge_runtime.engine.architecture import Hyperparameters
from edge_runtime.engine.graph import Capture
from edge_runtime.engine.neuron_groups import NeuronGroups
from edge_runtime.errors import RequestError

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of one or several sequences to run together, and what is asked beside the logits.

    Attributes:
        tokens: (n_rows,) token ids; None where `hidden` is given.
        positions: (n_rows,) position of each token in its sequence.
        sequences: (n_rows,) sequence of each token; one number serves for all rows.
        logits: rows whose logits are wanted; None means all, () none.
        hidden: (n_rows, n_embd) residual stream before the first layer run, in place of tokens.
        layers: layers to run; None means all. Logits need the last one.
        groups: layer -> neuron groups to compute, (n_groups,) or (n_rows, n_groups); the whole FFN
            in layers not named.
        fill: layer -> (n_embd,) added in place of the groups left out.
        add: layer -> (n_embd,) or (n_rows, n_embd), added to the residual stream before that layer;
            layer `layers.stop` means after the last one run.
        capture: what to read out.
        adapters: adapter name -> strength, one number or (n_rows,); those not named are off.
    """

    tokens: Sequence[int] | NDArray[np.int32] | None
    positions: Sequence[int] | NDArray[np.int32]
    sequences: Sequence[int] | NDArray[np.int32] | int = 0
    logits: Sequence[int] | NDArray[np.int32] | None = None
    hidden: Floats | None = None
    layers: range | None = None
    groups: Mapping[int, ArrayLike] = field(default_factory=dict)
    fill: Mapping[int, ArrayLike] = field(default_factory=dict)
    add: Mapping[int, ArrayLike] = field(default_factory=dict)
    capture: Collection[Capture] = ()
    adapters: Mapping[str, float | ArrayLike] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What a batch gave.

    Attributes:
        logits: (n_wanted, n_vocab) float32, in the order of `Batch.logits`.
        captured: each capture asked for, as described at `Capture`.
    """

    logits: Floats
    captured: dict[Capture, Floats]

    @property
    def hidden(self) -> Floats:
        """The last residual stream captured, (n_rows, n_embd)."""
        last = max(
            (capture for capture in self.captured if capture.kind == "residual"), key=lambda c: c.layer
        )
        return self.captured[last]


class CheckedBatch:
    """A batch's arrays, checked against the model: ggml itself would abort on a wrong one."""

    def __init__(
        self, batch: Batch, hp: Hyperparameters, groups: NeuronGroups | None, bank: AdapterBank | None
    ) -> None:
        self._batch, self._hp = batch, hp
        self.positions = np.asarray(batch.positions, np.int32)
        n_rows = len(self.positions)
        if self.positions.ndim != 1 or not n_rows or self.positions.min() < 0:
            raise RequestError(
                f"positions {self.positions.shape}: needed is a list of at least one, none negative"
            )
        self.sequences = np.broadcast_to(np.asarray(batch.sequences, np.int32), (n_rows,))
        self.layers = batch.layers if batch.layers is not None else range(hp.n_layers)
        if self.layers.step != 1 or not 0 <= self.layers.start <= self.layers.stop <= hp.n_layers:
            raise RequestError(f"layers {self.layers}: the model has {hp.n_layers}, run in order from 0")
        if (batch.tokens is None) == (batch.hidden is None):
            raise RequestError("a batch takes either tokens or hidden states")
        self.tokens = None if batch.tokens is None else self._tokens(batch.tokens)
        self.hidden = None if batch.hidden is None else self._vectors("hidden", batch.hidden)
        self.wanted = self._wanted(batch.logits)
        self.groups = {layer: self._groups(layer, ids, groups) for layer, ids in batch.groups.items()}
        self._check_layers(batch)
        self.strengths = self._strengths(batch.adapters, bank)

    def _tokens(self, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
        found = np.asarray(tokens, np.int32)
        if found.shape != self.positions.shape or found.min() < 0 or found.max() >= self._hp.n_vocab:
            raise RequestError(
                f"{found.shape} tokens in {found.min(initial=0)}..{found.max(initial=0)} for "
                f"{len(self.positions)} positions; token ids go from 0 to {self._hp.n_vocab - 1}"
            )
        return found

    def _wanted(self, logits: Sequence[int] | NDArray[np.int32] | None) -> NDArray[np.int32]:
        n_rows = len(self.positions)
        if self.layers.stop != self._hp.n_layers:
            if logits is not None and len(logits):
                raise RequestError(f"logits need the last layer; layers {self.layers} were asked for")
            return np.empty(0, np.int32)
        wanted = np.arange(n_rows, dtype=np.int32) if logits is None else np.asarray(logits, np.int32)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= n_rows):
            raise RequestError(f"logits of rows {wanted.min()}..{wanted.max()} of a batch of {n_rows}")
        return wanted

    def _groups(self, layer: int, ids: ArrayLike, groups: NeuronGroups | None) -> NDArray[np.int32]:
        if groups is None:
            raise RequestError("the model's neuron groups are not cut; call cut_neuron_groups() first")
        found = np.asarray(ids, np.int32)
        n_rows = len(self.positions)
        if found.ndim == 1:
            found = np.broadcast_to(found, (n_rows, found.size))
        if found.ndim != 2 or len(found) != n_rows:
            raise RequestError(f"groups of layer {layer} {found.shape}: needed is (n,) or ({n_rows}, n)")
        if found.size and (found.min() < 0 or found.max() >= groups.n_groups):
            raise RequestError(
                f"groups {found.min()}..{found.max()} of layer {layer}; it has {groups.n_groups} (from 0)"
            )
        if found.shape[1] > groups.n_groups or any(len(np.unique(row)) != len(row) for row in found):
            raise RequestError(f"groups of layer {layer}: the same group twice")
        return found

    def _check_layers(self, batch: Batch) -> None:
        for name, asked in (("groups", batch.groups), ("fill", batch.fill), ("add", batch.add)):
            stop = self.layers.stop + (name == "add")
            wrong = [layer for layer in asked if not self.layers.start <= layer < stop]
            if wrong:
                raise RequestError(f"{name} for layers {wrong}; this batch runs layers {self.layers}")
        for capture in batch.capture:
            stop = self.layers.stop + (capture.kind == "residual")
            empty = capture.kind in ("ffn_activation", "ffn_output") and (
                capture.layer in self.groups and not self.groups[capture.layer].shape[1]
            )
            if not self.layers.start <= capture.layer < stop or empty:
                raise RequestError(
                    f"capture {capture}: this batch runs layers {self.layers} and has no such value"
                )

    def _vectors(self, name: str, values: ArrayLike) -> Floats:
        found = np.asarray(values, np.float32)
        shape = (len(self.positions), self._hp.n_embd)
        if found.shape not in (shape, shape[1:]):
            raise RequestError(f"{name} {found.shape}: needed is {shape} or {shape[1:]}")
        return np.broadcast_to(found, shape)

    def _strengths(
        self, adapters: Mapping[str, float | ArrayLike], bank: AdapterBank | None
    ) -> dict[str, Floats]:
        unknown = set(adapters) - (bank.names if bank is not None else set())
        if unknown:
            raise RequestError(
                f"adapters {sorted(unknown)} are not loaded; loaded are {sorted(bank.names if bank else [])}"
            )
        n_rows = len(self.positions)
        found = {name: np.asarray(strength, np.float32) for name, strength in adapters.items()}
        for name, strength in found.items():
            if strength.shape not in ((), (n_rows,)):
                raise RequestError(
                    f"strength of adapter {name!r} {strength.shape}: needed is a number or ({n_rows},)"
                )
        return {name: np.broadcast_to(strength, (n_rows,)) for name, strength in found.items()}

    def values(self, bank: AdapterBank | None, inputs: Mapping[str, Any]) -> list[tuple[str, NDArray[Any]]]:
        """(input, values) of everything but positions, cells and mask."""
        found: list[tuple[str, NDArray[Any]]] = []
        if self.tokens is not None:
            found.append(("tokens", self.tokens))
        if self.hidden is not None:
            found.append(("hidden", self.hidden))
        if "output_rows" in inputs:
            found.append(("output_rows", self.wanted))
        for layer, ids in self.groups.items():
            if f"groups.{layer}" in inputs:
                found.append((f"groups.{layer}", ids))
        for layer, fill in self._batch.fill.items():
            found.append((f"fill.{layer}", self._vectors("fill", fill)[0]))
        for layer, vector in self._batch.add.items():
            found.append((f"add.{layer}", self._vectors("add", vector)))
        for name in inputs:
            if name.startswith("scale.") and bank is not None:
                matrix = name.removeprefix("scale.")
                found.append((name, bank.scales(matrix, self.strengths, len(self.positions))))
        return found
