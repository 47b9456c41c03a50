"""The low-rank update of ``ffn_down`` that gives every standing edit its change, and nothing else one.

With sampled keys ``K0`` (n_samples, n_ff) of ordinary text, ``C = K0ᵀK0 / n_samples + ridge``; with the keys
``K`` (n_keys, n_ff) of the edits and the changes ``R`` (n_keys, n_embd) they are to make, MEMIT [2210.07229]
minimises ``lambda * tr(D C Dᵀ) + sum |D k - r|²``: ``D = Rᵀ (lambda I + K C⁻¹ Kᵀ)⁻¹ K C⁻¹``. With a small
ridge C⁻¹ all but projects onto what ordinary text does not use, as AlphaEdit [2410.02355] does outright. C,
n_ff by n_ff, is never formed: Woodbury's identity needs a matrix of n_samples by n_samples [2506.04226].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

RIDGE = 0.002  # of C's mean eigenvalue
_ROWS, _COLUMNS = 128, 256  # of what is held in double precision beside the result
STIFFNESS = 0.1  # lambda, where the edits' own keys have C-norms near 1


class KeyCovariance:
    """``C⁻¹`` of sampled keys, applied to vectors.

    Args:
        samples: (n_samples, n_ff) keys of ordinary text.
    """

    def __init__(self, samples: NDArray[np.floating], ridge: float = RIDGE) -> None:
        self._samples = samples
        n_samples, n_ff = samples.shape
        gram = np.zeros((n_samples, n_samples))
        for part in self._parts():
            for start in range(0, n_samples, _ROWS):
                rows = slice(start, start + _ROWS)
                gram[rows] += part[rows] @ part.T
        self._ridge = ridge * float(np.trace(gram)) / (n_samples * n_ff)
        gram[np.diag_indices(n_samples)] += n_samples * self._ridge
        self._gram = gram

    def _parts(self) -> Iterator[Doubles]:
        """The samples in double precision, some columns at a time: all of them would take much memory."""
        for start in range(0, self._samples.shape[1], _COLUMNS):
            yield self._samples[:, start : start + _COLUMNS].astype(np.float64)

    def whitened(self, keys: NDArray[np.floating]) -> Doubles:
        """(n_keys, n_ff) rows ``C⁻¹ k``, by Woodbury's identity."""
        keys = np.asarray(keys, np.float64)
        columns = range(0, keys.shape[1], _COLUMNS)
        products = np.zeros((len(self._samples), len(keys)))
        for start, part in zip(columns, self._parts(), strict=True):
            products += part @ keys[:, start : start + _COLUMNS].T
        inner = np.linalg.solve(self._gram, products)
        found = keys / self._ridge
        for start, part in zip(columns, self._parts(), strict=True):
            found[:, start : start + _COLUMNS] -= (part.T @ inner).T / self._ridge
        whitened: Doubles = found
        return whitened


def readouts(
    covariance: KeyCovariance, keys: Floats, strengths: NDArray[np.floating], stiffness: float = STIFFNESS
) -> Floats:
    """Linear functions of the key that are about as strong as asked for at the keys, and else about nothing.

    Args:
        keys: (n_keys, n_ff).
        strengths: (n_keys, n_parts) what each part's function should be at each key.

    Returns:
        (n_parts, n_ff) float32.
    """
    whitened = covariance.whitened(keys)
    inner = whitened @ np.asarray(keys, np.float64).T
    inner = (inner + inner.T) / 2
    # Keys of one subject are alike: what they have in common decides, not their differences.
    inner[np.diag_indices(len(keys))] += stiffness * float(np.trace(inner)) / len(keys)
    found = np.linalg.solve(inner, np.asarray(strengths, np.float64))
    return np.ascontiguousarray(found.T @ whitened, np.float32)
