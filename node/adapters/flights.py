"""Slow work about adapters: one run for all who wait for the same thing, a bounded number of runs at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from node.errors import AdapterUnavailableError

_Result = TypeVar("_Result")


class Flights:
    """Runs work once per key. Belongs to one event loop.

    Args:
        limit: Runs that may be under way; one more is refused.
        timeout_s: How long a caller waits. The run itself goes on and its result serves the next caller.
    """

    def __init__(self, *, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Wait for the run of `key`, starting it where none is under way.

        A caller that is cancelled leaves the run to the others.

        Raises:
            AdapterUnavailableError: adapter_queue_full, or source_limit after `timeout_s`. Whatever the run raises.
        """
        task = self._running.get(key)
        if task is None:
            task = self._begin(key, start)
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._timeout_s)
        except TimeoutError as error:
            raise AdapterUnavailableError(
                f"fetching and checking took longer than {self._timeout_s:g} s; it goes on, try again",
                code="source_limit",
                retry_after_s=self._timeout_s,
            ) from error

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in tuple(self._running.values()):
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _begin(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, _Result]]) -> asyncio.Task[_Result]:
        if len(self._running) >= self._limit:
            raise AdapterUnavailableError(
                f"{self._limit} adapters are being fetched and checked; try again in a moment",
                code="adapter_queue_full",
                retry_after_s=1.0,
            )
        task = asyncio.get_running_loop().create_task(start())
        self._running[key] = task
        task.add_done_callback(lambda done: self._end(key, done))
        return task

    def _end(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # every caller may have given up; an error nobody reads is not the event loop's to report
