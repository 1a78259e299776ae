"""Slow work about adapters: one run for all who wait for the same thing, a bounded number of runs, shared over tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from node.adapters.turns import Turns, WeightOf, same_weight
from node.errors import AdapterUnavailableError

RETRY_AFTER_S = 1.0

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """One run: `turn` lets it begin, or refuses it; `task` waits for that and then works."""

    turn: asyncio.Future[None]
    task: asyncio.Task[Any]


class Flights:
    """Runs work once per key. Belongs to one event loop.

    Args:
        limit: Runs that may be under way, waiting or working; where one more comes, `Turns` says which is refused.
        timeout_s: How long a caller waits. The run itself goes on and its result serves the next caller.
        workers: Runs that work at once, the others wait for their tenant's turn; None: `limit`.
        weight_of: A tenant's weight.
    """

    def __init__(self, *, limit: int, timeout_s: float, workers: int | None = None, weight_of: WeightOf = same_weight) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._turns: Turns[Hashable] = Turns(workers=workers or limit, limit=limit, weight_of=weight_of)
        self._flights: dict[Hashable, _Flight] = {}

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, _Result]], tenant: str = "") -> _Result:
        """Wait for the run of `key`, starting it for `tenant` where none is under way.

        A caller that is cancelled leaves the run to the others.

        Raises:
            AdapterUnavailableError: adapter_queue_full, or source_limit after `timeout_s`. Whatever the run raises.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._begin(key, start, tenant)
        else:
            self._turns.share(tenant, key)
            self._let_start()
        try:
            return await asyncio.wait_for(asyncio.shield(flight.task), self._timeout_s)
        except TimeoutError as error:
            raise AdapterUnavailableError(
                f"fetching and checking took longer than {self._timeout_s:g} s; it goes on, try again",
                code="source_limit",
                retry_after_s=self._timeout_s,
            ) from error

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Any]], tenant: str) -> _Flight:
        refused = self._turns.join(tenant, key)
        if refused == key:
            raise self._full()
        if refused is not None:
            self._refuse(self._flights.pop(refused))
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        flight = self._flights[key] = _Flight(turn, loop.create_task(_fly(turn, start)))
        flight.task.add_done_callback(lambda _: self._end(key, flight))
        self._let_start()
        return flight

    def _refuse(self, flight: _Flight) -> None:
        if not flight.turn.done():  # cancelled by `close`
            flight.turn.set_exception(self._full())

    def _let_start(self) -> None:
        while (key := self._turns.start()) is not None:
            turn = self._flights[key].turn
            if not turn.done():  # cancelled by `close`: its end frees the worker again
                turn.set_result(None)

    def _end(self, key: Hashable, flight: _Flight) -> None:
        if self._flights.get(key) is flight:  # one that was refused has left, and may have been asked for again
            del self._flights[key]
            self._turns.leave(key)
            self._let_start()
        if not flight.task.cancelled():
            flight.task.exception()  # every caller may have given up; an error nobody reads is not the event loop's to report

    def _full(self) -> AdapterUnavailableError:
        return AdapterUnavailableError(
            f"{self._limit} adapters are being fetched and checked, which is the limit, and of those that wait the newest of the "
            "tenant with the most give way; try again in a moment",
            code="adapter_queue_full",
            retry_after_s=RETRY_AFTER_S,
        )


async def _fly(turn: asyncio.Future[None], start: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
    await turn
    return await start()
