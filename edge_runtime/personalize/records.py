"""What the store keeps of an adapter: a record of how it came about, and what computing with it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import RequestError

Kind = Literal["edit", "forget", "lora"]
State = Literal["queued", "running", "applied", "rejected", "reverted", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STATES: tuple[State, ...] = get_args(State)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_LONGEST_MODEL_NAME = 4096

# What may become of a record in each state, beside being removed where nothing runs or computes with it.
MAY_BECOME: Mapping[State, tuple[State, ...]] = {
    "queued": ("running", "failed"),
    "running": ("applied", "rejected", "queued", "failed"),
    "applied": ("reverted",),
    "rejected": ("applied",),
    "reverted": ("applied",),
    "failed": (),
}
REMOVABLE: tuple[State, ...] = ("queued", "rejected", "reverted", "failed")


@dataclass(frozen=True, slots=True)
class Record:
    """One adapter, or one edit on its way to become one.

    Attributes:
        id: never used twice, unlike the name.
        name: unique, also apart from upper and lower case, so that it can name a file.
        model: the model's name in the store, for people.
        identity: of the model's file, as `edge_runtime.model_store.identity.model_identity` gives it.
        created, changed: Unix time in seconds; `changed` is when it came into its state.
        request: what was asked for.
        report: what came of it; empty until there is one.
        error: why it failed; empty otherwise.
    """

    id: int
    name: str
    model: str
    identity: str
    kind: Kind
    state: State
    created: float
    changed: float
    request: Mapping[str, Any]
    report: Mapping[str, Any]
    error: str


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What a joint solution of standing edits needs of one of them.

    Attributes:
        layer: whose ``ffn_down`` is changed.
        keys: (n_keys, n_ff) float32, inputs of ``ffn_down`` at the subject's last token, one a context.
        parts: (n_keys,) int32, the row of `deltas` that each key belongs to.
        deltas: (n_parts, n_embd) float32, what is to be added to the layer's FFN output there.
    """

    layer: int
    keys: NDArray[np.float32]
    parts: NDArray[np.int32]
    deltas: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """Everything that is applied to one model, as it was at one moment.

    Attributes:
        revision: of the store at that moment.
        records: oldest first.
        changes: name -> its low-rank changes, in the order of `records`.
        solutions: id -> its solution, of those that have one; empty where they were not asked for.
    """

    revision: int
    records: tuple[Record, ...]
    changes: Mapping[str, tuple[LowRank, ...]]
    solutions: Mapping[int, Solution]


def check_name(name: str) -> None:
    """Refuse what cannot name an adapter.

    Raises:
        RequestError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name[:80]!r} is no adapter name; use letters, digits, '.', '_' and '-', at most 64, "
            "a letter first"
        )


def check_model(model: str, identity: str) -> None:
    """Refuse what cannot name a model or be the identity of its file.

    Raises:
        RequestError: it cannot.
    """
    if not 0 < len(model) <= _LONGEST_MODEL_NAME:
        raise RequestError(f"a model's name has 1 to {_LONGEST_MODEL_NAME} characters, this one {len(model)}")
    if not _IDENTITY.fullmatch(identity):
        raise RequestError(f"{identity[:80]!r} is no model identity; 64 hexadecimal digits are needed")
