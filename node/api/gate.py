"""How many requests are inside, and whether more may come in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node.engine.places import Places
from node.errors import OverloadedError


class Gate:
    """Counts the requests in progress. Refuses at the door, with an answer, instead of queueing without bound."""

    def __init__(self, limit: int, drain_retry_s: float) -> None:
        self._places = Places(limit)
        self._drain_retry_s = drain_retry_s
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._stays: set[asyncio.Timeout] = set()  # one of each request inside
        self.is_draining = False

    @asynccontextmanager
    async def entered(self, tenant: str) -> AsyncIterator[None]:
        """Hold one place; the last ones are not for a tenant that has many.

        Raises:
            OverloadedError: queue_full; draining, also from inside the block where `dismiss` ended it.
        """
        if self.is_draining:
            raise self._draining("takes no new requests; use another node or retry later")
        if not self._places.has_room(tenant):
            raise OverloadedError(
                f"{self._places.count} requests are in progress, as many as server.max_concurrent_requests "
                f"({self._places.limit}) allows this tenant now; retry later",
                retry_after_s=1.0,
            )
        self._places.enter(tenant)
        self._is_idle.clear()
        stay = asyncio.timeout(None)
        try:
            async with stay:
                self._stays.add(stay)
                yield
        except TimeoutError as error:
            if not stay.expired():
                raise
            raise self._draining("gave this request up; send it to another node or retry later") from error
        finally:
            self._stays.discard(stay)
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

    def dismiss(self) -> None:
        """Cancel the work of those inside; each of them leaves with an error, which its client can be told."""
        while self._stays:
            self._stays.pop().reschedule(0.0)

    def _draining(self, what: str) -> OverloadedError:
        return OverloadedError(f"the node is shutting down and {what}", code="draining", retry_after_s=self._drain_retry_s)
