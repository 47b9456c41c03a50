"""A download as a stream of its progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from edge_runtime.model_store.pull import PullOptions, pull
from edge_runtime.model_store.store import ModelStore, StoredModel

_PAUSE = 0.25  # seconds between two reports


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a download is.

    Attributes:
        total_bytes: None where the server does not say.
        notice: a line about what went wrong and is tried again; mostly empty.
        model: what is in the store now; only the last report has it.
    """

    done_bytes: int
    total_bytes: int | None
    notice: str = ""
    model: StoredModel | None = None


class _Abandoned(Exception):  # noqa: N818 - not an error: the client has gone
    pass


async def pull_stream(store: ModelStore, source: str, options: PullOptions) -> AsyncIterator[PullProgress]:
    """Fetch a model in a thread. A client that goes away stops it; what has arrived is kept for the next try.

    Raises:
        DownloadError, ModelFileError, RequestError: as :func:`pull` does.
    """
    state: tuple[int, int | None] = (0, None)
    notices: list[str] = []
    abandoned = False

    def progress(done: int, total: int | None) -> None:
        nonlocal state
        state = (done, total)
        if abandoned:
            raise _Abandoned

    task = asyncio.create_task(
        asyncio.to_thread(pull, store, source, options, progress=progress, notice=notices.append)
    )
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_PAUSE)
            yield PullProgress(*state, notice=notices.pop(0) if notices else "")
        model, _ = task.result()
        size = model.path.stat().st_size
        yield PullProgress(size, size, model=model)
    finally:
        abandoned = True
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
