"""One answer brought forward on its own, as an iterator over its pieces."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edge_runtime.engine.decoding import Decoding, Piece
from edge_runtime.engine.sampling import SamplingParameters
from edge_runtime.errors import RequestError

if TYPE_CHECKING:
    from edge_runtime.engine.engine import Engine


class Generation(Decoding):
    """An answer in progress: iterate over its pieces, or take the whole `text`. Closing it stops the work."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        *,
        sampling: SamplingParameters,
        limit: int,
        stop: Sequence[str],
        adapters: Mapping[str, float] | None,
    ) -> None:
        super().__init__(
            engine.tokenizer, prompt, sampling=sampling, limit=limit, stop=stop, adapters=adapters
        )
        self._engine = engine
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def text(self) -> str:
        """The rest of the text, as a whole."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop; the sequence is free for the next request."""
        self._pieces.close()

    def _run(self) -> Generator[Piece, None, None]:
        if not self._engine.begin(self):
            raise RequestError(
                f"all {len(self._engine.places)} sequences of this engine are busy; close one first"
            )
        try:
            while self.finish_reason is None:
                for _, piece in self._engine.advance([self]):
                    if piece.text or piece.tokens:
                        yield piece
        finally:
            self._engine.end(self)
