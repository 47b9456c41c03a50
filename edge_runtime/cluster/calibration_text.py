"""A text as windows of tokens to measure a model on.

A form feed ends a document. Each window begins like a text of its own, and no token sees another document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine.batch import Batch
from edge_runtime.engine.tokenizer import Tokenizer
from edge_runtime.errors import RequestError

DOCUMENT_END = "\f"
LEAST_TOKENS = 64  # of a text: with fewer, a figure would say nothing
_CHARACTERS_A_TOKEN = 64  # more than a token has on average in any text
_MAX_DOCUMENTS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Tokens that are run at once: pieces of documents, each a sequence of its own.

    Attributes:
        batch: wants the logits of the rows that are scored.
        targets: (n_scored,) the token that follows each of them.
    """

    batch: Batch
    targets: NDArray[np.int32]

    @property
    def n_rows(self) -> int:
        """Tokens."""
        return len(self.batch.positions)


def windows(
    tokenizer: Tokenizer, text: str, *, n_rows: int, n_sequences: int, n_scored: int, max_tokens: int
) -> list[Window]:
    """Cut a text into windows; control tokens written out in it are read as such.

    Args:
        n_rows: most tokens of a window.
        n_sequences: most documents, or pieces of one, in a window.
        n_scored: most rows of a window whose logits are wanted; they are spread evenly.
        max_tokens: what is longer is cut off.

    Raises:
        RequestError: fewer than `LEAST_TOKENS` tokens.
    """
    found: list[Window] = []
    pieces: list[NDArray[np.int32]] = []
    filled = total = 0
    for piece in _pieces(tokenizer, text, n_rows, max_tokens):
        if filled + len(piece) > n_rows or len(pieces) == n_sequences:
            found.append(_window(pieces, n_scored))
            pieces, filled = [], 0
        pieces.append(piece)
        filled += len(piece)
        total += len(piece)
    if total < LEAST_TOKENS:
        raise RequestError(
            f"the text has {total} tokens, at least {LEAST_TOKENS} are needed (some thousands are better); "
            "give a longer one"
        )
    found.append(_window(pieces, n_scored))
    return found


def _pieces(tokenizer: Tokenizer, text: str, n_rows: int, max_tokens: int) -> Iterator[NDArray[np.int32]]:
    """Documents as tokens, long ones in several pieces, `max_tokens` in all."""
    left = max_tokens
    begin = [tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []
    size = n_rows - len(begin)
    for document in text.split(DOCUMENT_END, _MAX_DOCUMENTS)[:_MAX_DOCUMENTS]:
        tokens = tokenizer.encode(document[: left * _CHARACTERS_A_TOKEN], add_bos=False, parse_special=True)
        for start in range(0, len(tokens), size):
            piece = np.array(begin + tokens[start : start + size], np.int32)[: max(left, 0)]
            if len(piece) > 1:  # else nothing follows that could be predicted
                left -= len(piece)
                yield piece


def _window(pieces: list[NDArray[np.int32]], n_scored: int) -> Window:
    tokens = np.concatenate(pieces)
    positions = np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in pieces])
    sequences = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    # The last token of a piece has no successor; the next row is position 0 there.
    followed = np.flatnonzero(np.append(positions[1:], 0) > 0)
    if len(followed) > n_scored:
        followed = followed[np.linspace(0, len(followed) - 1, n_scored).round().astype(np.intp)]
    batch = Batch(tokens, positions, sequences, followed.astype(np.int32))
    return Window(batch, tokens[followed + 1])
