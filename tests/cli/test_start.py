"""What becomes of a start that is told to stop."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from node.cli import start

NODE = object()


@pytest.fixture
def stop():
    return asyncio.Event()


async def test_start_that_is_told_to_stop_closes_what_it_opened(stop):
    is_closed = asyncio.Event()

    @asynccontextmanager
    async def opening():
        try:
            stop.set()
            await asyncio.Event().wait()  # weights that take minutes
            yield NODE
        finally:
            is_closed.set()

    async with AsyncExitStack() as stack:
        assert await start._opened(stack, opening(), stop) is None
        assert is_closed.is_set()


async def test_node_that_serves_is_closed_by_its_stack_and_not_by_the_signal(stop):
    is_closed = asyncio.Event()

    @asynccontextmanager
    async def opening():
        yield NODE
        is_closed.set()

    async with AsyncExitStack() as stack:
        assert await start._opened(stack, opening(), stop) is NODE
        stop.set()
        await asyncio.sleep(0)
        assert not is_closed.is_set()
    assert is_closed.is_set()


async def test_timeout_of_a_room_is_no_wish_to_stop(stop):
    @asynccontextmanager
    async def opening():
        raise TimeoutError
        yield

    async with AsyncExitStack() as stack:
        with pytest.raises(TimeoutError):
            await start._opened(stack, opening(), stop)
