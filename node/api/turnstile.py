"""Requests begin one at a time, so that a crowd at the door delays nobody who is served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

BUSY_SHARE = 0.75  # of the loop's time; below it, a newcomer takes nothing that anybody wants
TICK_S = 0.001  # as fine as the loop's timers are
LONGEST_PACE_S = 0.003  # between two newcomers, however busy the loop is

Later = Callable[[float, Callable[[], None]], None]
Begin = Callable[[], bool]  # begins something; False where whoever waited is gone and nothing began


class Turnstile:
    """Lets beginnings through. For one event loop.

    Reading, checking and refusing a request takes some hundred microseconds. Two hundred at once, each taken up as it came,
    keep the events of answers that are under way waiting for their sum; and a loop that never rests keeps the interpreter lock
    from the threads that commit records.

    Semantics:
        Who finds nobody before it begins at once. New connections wait until the loop has rested for a quarter of the time
        since the last one, at most `LONGEST_PACE_S`. Requests on connections that were answered before wait for no new
        connection, only for their like, one in a turn of the loop. What waits is as much as there are connections, which are
        bounded.

    Args:
        clock: Monotonic seconds. busy_clock: seconds that this thread has computed.
        later: Calls a function after so many seconds; None: the running loop's timers do.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        busy_clock: Callable[[], float] = time.thread_time,
        later: Later | None = None,
    ) -> None:
        self._clock = clock
        self._busy_clock = busy_clock
        self._later = later or _on_this_loop
        self._new: deque[Begin] = deque()
        self._known: deque[Begin] = deque()
        self._is_pacing = False
        self._is_turning = False
        self._last_s = 0.0
        self._last_busy_s = 0.0

    def come(self, begin: Begin) -> None:
        """Call `begin` for a new connection, now or when it is its turn."""
        if self._is_pacing:
            self._new.append(begin)
        elif begin():
            self._pace()

    async def again(self) -> None:
        """Wait for the turn of a request on a connection that was answered before."""
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._turn)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._known.append(lambda: _has_come(turn))
        await turn

    def _pace(self) -> None:
        self._is_pacing = True
        self._last_s, self._last_busy_s = self._clock(), self._busy_clock()
        self._later(TICK_S, self._tick)

    def _tick(self) -> None:
        if not self._new:
            self._is_pacing = False
            return
        passed_s = self._clock() - self._last_s
        busy_s = self._busy_clock() - self._last_busy_s
        if passed_s < LONGEST_PACE_S and busy_s > BUSY_SHARE * passed_s:
            self._later(TICK_S, self._tick)
            return
        while self._new:
            if self._new.popleft()():
                break
        self._pace()

    def _turn(self) -> None:
        while self._known:
            if self._known.popleft()():
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._is_turning = False


def _on_this_loop(delay_s: float, call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(delay_s, call)


def _has_come(turn: asyncio.Future[None]) -> bool:
    if turn.done():
        return False
    turn.set_result(None)
    return True
