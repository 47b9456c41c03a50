"""An answer on its way from the thread that computes it to the client that waits for it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from edge_runtime.daemon.requests import Chunk, Usage
from edge_runtime.errors import DeadlineError


def _nothing() -> None:
    """What is left to abandon of an answer that has ended."""


_numbers = itertools.count(1)
_process = secrets.token_hex(4)  # ids of one daemon differ from those of the one before


class Answer:
    """Chunks as they come; iterate over it on the event loop that made it.

    Leaving it before its end, by `cancel` or by its context manager, frees its place within one token.

    Attributes:
        id: unique among all answers.
        model: name of the model that answers.
        created: seconds since the epoch.
        prompt_tokens: length of the prompt.
        usage: what it took; None until it has ended.
    """

    def __init__(self, model: str, prompt_tokens: int, abandon: Callable[[], None]) -> None:
        self.id = f"{_process}-{next(_numbers)}"
        self.model = model
        self.created = time.time()
        self.prompt_tokens = prompt_tokens
        self.usage: Usage | None = None
        self._abandon = abandon
        self._chunks: deque[Chunk] = deque()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._cancelled = False

    # --- for the client -----------------------------------------------------------------------

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended or self._cancelled:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._chunks.popleft()

    def cancel(self) -> None:
        """Stop the work; what has come already can still be read. Safe to call at any time."""
        if not self._ended and not self._cancelled:
            self._cancelled = True
            self._abandon()
            self._release()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    # --- for the worker, on the event loop ----------------------------------------------------

    def put(self, chunk: Chunk) -> None:
        """More text."""
        self._chunks.append(chunk)
        self._changed.set()

    def finish(self, usage: Usage) -> None:
        """The end."""
        self.usage = usage
        self._ended = True
        self._release()

    def fail(self, error: BaseException) -> None:
        """An end that is an error, raised to the client after the chunks before it."""
        self._error = error
        self._ended = True
        self._release()

    def _release(self) -> None:
        # The worker's job holds this answer, and `_abandon` the job: without that circle both go at once.
        self._abandon = _nothing
        self._changed.set()


def deadline_error(seconds: float, generated: int) -> DeadlineError:
    """The error of a request whose time is over."""
    return DeadlineError(
        f"the request's {seconds:g} s are over after {generated} tokens; "
        "ask for fewer tokens, allow more time, or try when the device is less busy"
    )
