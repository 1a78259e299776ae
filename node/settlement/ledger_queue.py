"""Work on its way to the ledger's writer: bounded, in order, and handed over as it was handed in."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class WorkQueue(Generic[_Item]):
    """For one taker; any thread may put. What is put at once is there at once: the answers of one step share a commit, however
    the threads take turns.

    Args:
        limit: Items that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._is_closed

    @property
    def is_ended(self) -> bool:
        """Whether it is closed and nothing is left."""
        with self._changed:
            return self._is_closed and not self._items

    @property
    def waiting(self) -> int:
        """How many there are."""
        return len(self._items)

    def put(self, items: Sequence[_Item]) -> bool:
        """Hand over all of them, or none where they do not all find room or nothing more is taken; says which. Never blocks."""
        with self._changed:
            if self._is_closed or len(self._items) + len(items) > self.limit:
                return False
            self._items.extend(items)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Nothing more is taken; nobody is waited for any longer."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def wait(self, count: int, timeout_s: float | None) -> None:
        """Until so many items are there, the queue is closed, or the time has passed; None: however long it takes."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) >= count, timeout_s)

    def take(self, count: int) -> list[_Item]:
        """The first items, at most so many; none where none are there."""
        with self._changed:
            return [self._items.popleft() for _ in range(min(count, len(self._items)))]
