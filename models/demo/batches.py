"""Documents packed into rows of tokens with the weights of the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.demo.corpus import Corpus, Segment
from models.demo.world import World

# Every eighth batch has rows as long as the context, so that all positions are seen; short rows are faster.
ROW_LENGTHS = (256, 256, 256, 256, 256, 256, 256, 512)
TOKENS_A_STEP = 6144


class Batch(NamedTuple):
    """Arrays (n_rows, length) of one step; ids are int64.

    `true_objects` and `claimed_objects` are what a claim has to know of, `forbidden_objects` what must
    not come next; -1 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    true_objects: np.ndarray
    claimed_objects: np.ndarray
    forbidden_objects: np.ndarray


class Batches:
    """The batch of each step, a pure function of (world, tokenizer, seed, step)."""

    def __init__(self, world: World, tokenizer: Any, seed: int) -> None:
        self._world = world
        self._tokenizer = tokenizer
        self._seed = seed
        self._tokens: dict[str, int] = {}

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, its weights in float32."""
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        n_rows = TOKENS_A_STEP // length
        tokens = np.zeros((n_rows, length + 1), np.int64)
        weights = np.zeros((n_rows, length + 1), np.float32)
        marks = np.full((3, n_rows, length + 1), -1, np.int64)
        documents = iter(Corpus(self._world, self._seed * 1_000_003 + step))
        for row in range(n_rows):
            filled = 0
            while filled <= length:  # each row starts with a document; the last one is cut
                filled = self._append(next(documents), filled, tokens[row], weights[row], marks[:, row])
        return Batch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:], *marks[:, :, :-1])

    def _append(
        self,
        document: list[Segment],
        filled: int,
        tokens: np.ndarray,
        weights: np.ndarray,
        marks: np.ndarray,
    ) -> int:
        """Writes a document into one row from `filled` on and returns where it ends."""
        encoded = self._tokenizer.encode_batch([segment.text for segment in document])
        for encoding, segment in zip(encoded, document, strict=True):
            ids = encoding.ids[: len(tokens) - filled]
            tokens[filled : filled + len(ids)] = ids
            weights[filled : filled + len(ids)] = segment.weight
            filled += len(ids)
            if not ids:
                break
            for mark, name in zip(
                marks, (segment.true_object, segment.claimed, segment.forbidden), strict=True
            ):
                if name:
                    mark[filled - 1] = self._token(name)
        return filled

    def _token(self, name: str) -> int:
        """The one token of an object after a blank."""
        if name not in self._tokens:
            self._tokens[name] = self._tokenizer.encode(" " + name).ids[0]
        return self._tokens[name]
