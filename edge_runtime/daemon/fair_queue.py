"""Requests that wait, served in turn between the clients that sent them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served for each client; between clients, one request each in turn.

    A client that sends many requests at once so delays its own, not the others'.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Item]:
        """All items; those of one client in order."""
        for items in self._waiting.values():
            yield from items

    def push(self, client: str, item: Item) -> None:
        """Let an item wait."""
        self._waiting.setdefault(client, deque()).append(item)

    def pop(self) -> Item:
        """The next item; its client is last in line then.

        Raises:
            IndexError: nothing waits.
        """
        if not self._waiting:
            raise IndexError("nothing waits")
        client, items = next(iter(self._waiting.items()))
        item = items.popleft()
        if items:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out; whether it was there."""
        for client, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[client]
                return True
        return False
