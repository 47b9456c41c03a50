"""Whose turn it is to compute: answers and edits take the engine alternately, and answers get more of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.personalize.progress import Cancelled

SHARE = 1 / 3  # of the time that an edit gets at most while answers are computed
_LOOK_SECONDS = 0.005  # how often a waiting edit looks whether anybody still asks for answers


class EditTurns:
    """An edit's turns. Each is one forward pass; the next comes once the answers have had theirs.

    Args:
        turn: held while computing; the threads that compute answers hold it for each token.
        answering: whether answers are being computed or wait for it.
        share: of the time that the edit gets at most while they are.

    Attributes:
        passes: so far.
    """

    def __init__(self, turn: threading.Lock, answering: Callable[[], bool], *, share: float = SHARE) -> None:
        self.passes = 0
        self._turn = turn
        self._answering = answering
        self._pause = 1 / share - 1  # times the length of the pass before
        self._next = 0.0  # when the next one may begin while answers are computed
        self._stopped = threading.Event()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One turn.

        Raises:
            Cancelled: the edit was stopped.
        """
        while time.monotonic() < self._next and not self._stopped.is_set() and self._answering():
            self._stopped.wait(min(_LOOK_SECONDS, max(0.0, self._next - time.monotonic())))
        if self._stopped.is_set():
            raise Cancelled
        with self._turn:
            began = time.monotonic()
            try:
                yield
            finally:
                ended = time.monotonic()
                self.passes += 1
                self._next = ended + (ended - began) * self._pause

    def stop(self) -> None:
        """Let the edit end before its next pass; from any thread."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether it was asked to end."""
        return self._stopped.is_set()
