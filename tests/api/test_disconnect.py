"""Clients that hang up and servers that stop: the sequence ends, the books close once, what was delivered is recorded."""

from __future__ import annotations

import asyncio

import aiohttp

from node.api.application import build_application
from node.api.listener import Listener

STREAM = {"model": "alice", "prompt": "hi", "max_tokens": 32, "stream": True}


async def test_stream_hang_up_cancels_and_records_the_delivered_tokens(bench, client):
    bench.engine.hold_after = 2
    answer = await client.post("/v1/completions", json=STREAM)
    await bench.engine.held.wait()
    assert b"hello" in await answer.content.readany()
    answer.close()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    closing = bench.one_closing()
    assert closing.status == "cancelled"
    assert list(closing.outputs[0]) == bench.tokenizer.encode("hello world")[:2]
    assert bench.engine.cancelled == [bench.engine.submits[0].sequence_id]


async def test_hang_up_before_a_whole_answer_delivers_and_records_no_token(bench, client):
    bench.engine.hold_after = 2
    task = asyncio.create_task(client.post("/v1/completions", json={**STREAM, "stream": False}))
    await bench.engine.held.wait()
    task.cancel()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    closing = bench.one_closing()
    assert (closing.status, closing.outputs) == ("cancelled", ((),))
    assert bench.engine.cancelled == [bench.engine.submits[0].sequence_id]


async def test_hang_up_cancels_every_choice(bench, client):
    bench.engine.hold_after = 1
    answer = await client.post("/v1/completions", json={**STREAM, "n": 3})
    await bench.engine.held.wait()
    answer.close()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    assert bench.one_closing().status == "cancelled"
    assert sorted(bench.engine.cancelled) == sorted(submit.sequence_id for submit in bench.engine.submits)


async def test_hang_up_during_admission_still_closes_the_books(bench, client):
    is_opening, may_open = asyncio.Event(), asyncio.Event()
    original = bench.books.open

    async def slow_open(opening):
        is_opening.set()
        await may_open.wait()
        await original(opening)

    bench.books.open = slow_open
    task = asyncio.create_task(client.post("/v1/completions", json=STREAM))
    await is_opening.wait()
    task.cancel()
    await asyncio.wait([task])
    for _ in range(20):
        await asyncio.sleep(0)
    may_open.set()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    assert bench.one_closing().status == "cancelled"
    assert bench.engine.submits == []


async def test_drain_lets_the_running_finish_refuses_newcomers_and_turns_health_503(bench):
    listener = Listener(build_application(bench.services))
    port = await listener.open("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        bench.engine.hold_after = 2
        running = await session.post("/v1/completions", json=STREAM)
        await bench.engine.held.wait()
        closing = asyncio.create_task(listener.close(10.0))
        while (refused := await session.post("/v1/completions", json=STREAM)).status == 200:
            refused.close()
        assert (refused.status, (await refused.json())["error"]["code"]) == (503, "draining")
        assert (await session.get("/health")).status == 503
        running.close()
        assert await closing is True


async def test_shutdown_cancels_what_outlives_the_drain_and_records_it(bench):
    listener = Listener(build_application(bench.services))
    port = await listener.open("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        bench.engine.hold_after = 2
        running = await session.post("/v1/completions", json=STREAM)
        await bench.engine.held.wait()
        assert await listener.close(0.01) is False
        assert bench.one_closing().status == "cancelled"
        running.close()
