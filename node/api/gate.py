"""How many requests are inside, and whether more may come in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from node.engine.places import Places
from node.errors import OverloadedError


class Gate:
    """Counts the requests in progress. Refuses at the door, with an answer, instead of queueing without bound."""

    def __init__(self, limit: int, drain_retry_s: float) -> None:
        self._places = Places(limit)
        self._drain_retry_s = drain_retry_s
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False

    @contextmanager
    def entered(self, tenant: str) -> Iterator[None]:
        """Hold one place; the last ones are not for a tenant that has many.

        Raises:
            OverloadedError: queue_full or draining.
        """
        if self.is_draining:
            raise OverloadedError(
                "the node is shutting down and takes no new requests; use another node or retry later",
                code="draining",
                retry_after_s=self._drain_retry_s,
            )
        if not self._places.has_room(tenant):
            raise OverloadedError(
                f"{self._places.count} requests are in progress, as many as server.max_concurrent_requests "
                f"({self._places.limit}) allows this tenant now; retry later",
                retry_after_s=1.0,
            )
        self._places.enter(tenant)
        self._is_idle.clear()
        try:
            yield
        finally:
            self._places.leave(tenant)
            if not self._places.count:
                self._is_idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers and wait for those inside. Returns whether all of them finished in time."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
