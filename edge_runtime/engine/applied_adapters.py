"""Which adapters a model's answers can use, by name, and which version of each an answer goes on with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.adapters import Adapters, check_changes, version_of
from edge_runtime.engine.model import Model
from edge_runtime.errors import AdapterNotFoundError, RequestError

Floats = NDArray[np.float32]

MAX_STRENGTH = 10.0
NO_ADAPTERS: Mapping[str, float] = {}

Under = tuple[tuple[str, float], ...]
"""What an answer is computed with: (version, strength) of each adapter, in ascending order."""


def check_strengths(strengths: Mapping[str, float]) -> None:
    """Refuse what is no strength.

    Raises:
        RequestError: it is not.
    """
    for name, strength in strengths.items():
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not number or not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
            raise RequestError(
                f"adapter {name!r}: strength = {strength!r}; possible are -{MAX_STRENGTH:g} to "
                f"{MAX_STRENGTH:g}"
            )


def strengths_of(unders: Sequence[tuple[Under, int]]) -> dict[str, Floats]:
    """Version -> (n_rows,) strengths, from what each answer is computed with and how many rows it has."""
    found: dict[str, Floats] = {}
    n_rows = sum(count for _, count in unders)
    start = 0
    for under, count in unders:
        for version, strength in under:
            rows = found.setdefault(version, np.zeros(n_rows, np.float32))
            rows[start : start + count] = strength
        start += count
    return found


class AppliedAdapters:
    """Names, and the versions that they stand for now. Used by the engine's thread but where it says so.

    The model's bank knows adapters by their version, so that answers that began with one that was replaced
    since can go on with it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._versions: dict[str, str] = {}  # of the names; replaced as a whole, as other threads read it

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that are applied; from any thread."""
        return tuple(self._versions)

    def check(self, wanted: Mapping[str, float] | None) -> None:
        """Refuse what :meth:`resolve` would refuse now; from any thread.

        Raises:
            AdapterNotFoundError: a name that is not applied. RequestError: a strength out of range.
        """
        self.resolve(wanted)

    def resolve(self, wanted: Mapping[str, float] | None) -> Under:
        """The versions that an answer begins with.

        Args:
            wanted: name -> strength; None: all that are applied, with strength 1.

        Raises:
            AdapterNotFoundError: a name that is not applied. RequestError: a strength out of range.
        """
        versions = self._versions
        if wanted is None:
            wanted = dict.fromkeys(versions, 1.0)
        unknown = [name for name in wanted if name not in versions]
        if unknown:
            there = f"applied are {', '.join(map(repr, versions))}" if versions else "none is applied"
            raise AdapterNotFoundError(
                f"no adapter {', '.join(map(repr, unknown))} is applied to this model; {there}"
            )
        check_strengths(wanted)
        total: dict[str, float] = {}
        for name, strength in wanted.items():  # two names may stand for the same changes
            total[versions[name]] = total.get(versions[name], 0.0) + float(strength)
        return tuple(sorted((version, strength) for version, strength in total.items() if strength))

    def holds(self, under: Under) -> bool:
        """Whether the model can still compute with these."""
        bank = self._model.adapters
        return not under or (bank is not None and bank.names.issuperset(version for version, _ in under))

    def replace(self, adapters: Adapters, kept: Collection[str]) -> None:
        """Apply these and no others from the next answer on; what is ``kept`` stays for those that use it.

        Raises:
            RequestError: an adapter that does not fit the model; all stays as it was.
            OutOfMemoryError: they do not fit.
        """
        for name, changes in adapters.items():
            check_changes(name, changes, self._model.weights)
        versions = {name: version_of(changes) for name, changes in adapters.items()}
        changes_of = {versions[name]: changes for name, changes in adapters.items()}
        self._set({**self._held(kept), **changes_of})
        self._versions = versions

    def drop_unused(self, kept: Collection[str]) -> bool:
        """Free versions that no name stands for and nobody uses; whether there were any."""
        wanted = {*kept, *self._versions.values()}
        bank = self._model.adapters
        if bank is None or wanted.issuperset(bank.names):
            return False
        self._set(self._held(wanted))
        return True

    def _held(self, versions: Collection[str]) -> Adapters:
        bank = self._model.adapters
        return {} if bank is None else {v: bank.adapters[v] for v in versions if v in bank.names}

    def _set(self, adapters: Adapters) -> None:
        bank = self._model.adapters
        if (bank.names if bank is not None else frozenset()) != frozenset(adapters):
            self._model.set_adapters(adapters)
