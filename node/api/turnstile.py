"""Requests begin one at a time, one in a turn of the event loop, so that a crowd at the door delays nobody who is served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

NEW, KNOWN = 0, 1  # lanes: connections that come, requests on connections that have been answered before


class Turnstile:
    """Lets beginnings through. For one event loop.

    Reading, checking and refusing a request takes some hundred microseconds. Two hundred at once, each taken up as it came, keep
    the events of answers that are under way waiting for their sum. Here the loop comes round between any two of them. Nothing is
    slowed down where nothing else is to do: the loop comes round at once.

    Semantics:
        Who finds nobody before it begins at once. The two lanes take turns, so a crowd of new connections is one place in the
        queue to those who were here before. What waits is as much as there are connections, which are bounded.
    """

    def __init__(self) -> None:
        self._lanes: tuple[deque[Callable[[], bool]], ...] = (deque(), deque())
        self._is_taken = False
        self._first = NEW

    def enter(self, lane: int, begin: Callable[[], bool]) -> None:
        """Call `begin` now or in a later turn. It says whether anything began: somebody who hung up takes no turn."""
        if self._is_taken:
            self._lanes[lane].append(begin)
        elif begin():
            self._is_taken = True
            asyncio.get_running_loop().call_soon(self._turn)

    async def passed(self, lane: int) -> None:
        """Wait for a turn."""
        if not self._is_taken:
            self.enter(lane, lambda: True)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.enter(lane, lambda: _has_come(turn))
        await turn

    def _turn(self) -> None:
        while lane := self._lanes[self._first] or self._lanes[1 - self._first]:
            self._first = NEW if lane is self._lanes[KNOWN] else KNOWN
            if lane.popleft()():
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._is_taken = False


def _has_come(turn: asyncio.Future[None]) -> bool:
    if turn.done():
        return False
    turn.set_result(None)
    return True
