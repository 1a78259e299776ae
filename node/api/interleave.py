"""Several asynchronous sources, followed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


async def interleave(sources: Sequence[AsyncIterator[_Item]]) -> AsyncGenerator[tuple[int, _Item], None]:
    """Yield (index of the source, item) as items come.

    The first error of any source is raised here and ends all of them; closing this iterator ends them too. One source is
    followed directly, without tasks: it is the common case and the one where latency shows.
    """
    if len(sources) == 1:
        async for only in sources[0]:
            yield 0, only
        return
    # One slot a source: a source that is ahead waits, so memory stays bounded by the number of sources.
    queue: asyncio.Queue[tuple[int, _Item] | BaseException | None] = asyncio.Queue(maxsize=len(sources))
    tasks = [asyncio.create_task(_follow(index, source, queue)) for index, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    index: int, source: AsyncIterator[_Item], queue: asyncio.Queue[tuple[int, _Item] | BaseException | None]
) -> None:
    try:
        async for item in source:
            await queue.put((index, item))
    except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
        await queue.put(error)
    else:
        await queue.put(None)
