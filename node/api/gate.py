"""How many requests are inside, and whether more may come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from node.errors import OverloadedError


class Gate:
    """Counts the requests in progress. Refuses at the door, with an answer, instead of queueing without bound."""

    def __init__(self, limit: int, drain_retry_s: float) -> None:
        self._limit = limit
        self._drain_retry_s = drain_retry_s
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.count = 0
        self.is_draining = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            OverloadedError: queue_full or draining.
        """
        if self.is_draining:
            raise OverloadedError(
                "the node is shutting down and takes no new requests; use another node or retry later",
                code="draining",
                retry_after_s=self._drain_retry_s,
            )
        if self.count >= self._limit:
            raise OverloadedError(
                f"{self.count} requests are in progress, as many as server.max_concurrent_requests allows; retry later",
                retry_after_s=1.0,
            )
        self.count += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if self.count == 0:
                self._is_idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers and wait for those inside. Returns whether all of them finished in time."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
