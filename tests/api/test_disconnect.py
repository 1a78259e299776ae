"""Clients that hang up and servers that stop: the sequence ends, the books close once, what was delivered is recorded."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import pytest

from node.api.application import build_application
from node.api.listener import Listener
from node.errors import LedgerError

STREAM = {"model": "alice", "prompt": "hi", "max_tokens": 32, "stream": True}
CHAT = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 32, "stream": True}
LORAX = {"inputs": "hi", "parameters": {"adapter_id": "alice", "max_new_tokens": 32}}


@pytest.fixture
async def serve(make_bench):
    """Start a listener with these server settings, and a client of it."""
    sessions = []

    async def start(**server):
        bench = make_bench(**server)
        listener = Listener(build_application(bench.services))
        port = await listener.open("127.0.0.1", 0)
        sessions.append(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
        return bench, listener, sessions[-1]

    yield start
    for session in sessions:
        await session.close()


def code_of(body):
    """Of an error in OpenAI's shape or LoRAX's."""
    return body["error"]["code"] if isinstance(body["error"], dict) else body["code"]


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


@pytest.mark.parametrize("is_durable", [True, False])
async def test_hang_up_during_admission_closes_the_books_where_they_were_opened(bench, client, is_durable):
    is_opening, refusals = asyncio.Event(), []
    opened, closed = bench.books.open, bench.books.close

    async def slow_open(opening):
        if is_durable:
            await opened(opening)
        is_opening.set()
        await asyncio.Event().wait()

    async def watched_close(closing):
        try:
            return await closed(closing)
        except LedgerError as error:
            refusals.append(error)
            raise
        finally:
            is_closed.set()

    is_closed = asyncio.Event()
    bench.books.open, bench.books.close = slow_open, watched_close
    task = asyncio.create_task(client.post("/v1/completions", json=STREAM))
    await is_opening.wait()
    task.cancel()
    await asyncio.wait([task])
    await asyncio.wait_for(is_closed.wait(), 10)

    assert [closing.status for closing in bench.books.closed] == ["cancelled"] * is_durable
    assert len(refusals) == (not is_durable)
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


@pytest.mark.parametrize("tokens_before", [0, 2])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", STREAM), ("/v1/chat/completions", CHAT), ("/generate_stream", LORAX)]
)
async def test_shutdown_cancels_what_outlives_the_drain_and_records_it(serve, path, body, tokens_before):
    bench, listener, session = await serve(keep_alive_s=0.001)  # so that the status leaves before the first token
    bench.engine.hold_after = tokens_before
    running = await session.post(path, json=body)
    await bench.engine.held.wait()
    assert await listener.close(0.01) is False
    events = [line.removeprefix("data: ") for line in (await running.text()).splitlines() if line.startswith("data: ")]
    if path != "/generate_stream":
        assert events.pop() == "[DONE]"
    assert code_of(json.loads(events.pop())) == "draining"
    assert "error" not in "".join(events)
    closing = bench.one_closing()
    assert (closing.status, len(closing.outputs[0])) == ("cancelled", tokens_before)
    assert bench.engine.cancelled == [bench.engine.submits[0].sequence_id]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "one"}])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", STREAM), ("/v1/chat/completions", CHAT), ("/generate", LORAX)])
async def test_shutdown_answers_a_whole_request_that_outlives_the_drain_503_with_its_receipt(serve, path, body, headers):
    bench, listener, session = await serve()
    bench.engine.hold_after = 2
    asking = asyncio.create_task(session.post(path, json={**body, "stream": False}, headers=headers))
    await bench.engine.held.wait()
    assert await listener.close(0.01) is False
    answer = await asking
    assert (answer.status, code_of(await answer.json())) == (503, "draining")
    closing = bench.one_closing()
    assert (closing.status, closing.outputs) == ("cancelled", ((),))
    assert answer.headers["x-openlora-receipt"] == closing.request_id
    assert "Retry-After" in answer.headers


async def test_shutdown_does_not_wait_for_a_reader_that_takes_nothing(serve):
    bench, listener, session = await serve(write_timeout_s=60.0)
    bench.engine.answer_ids = [65] * 490
    bench.engine.hold_after = 489
    body = {**CHAT, "max_tokens": 490, "n": 8, "temperature": 1, "logprobs": True, "top_logprobs": 20}
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (session._base_url.host, session._base_url.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    await loop.sock_sendall(connection, f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    await bench.engine.held.wait()
    await asyncio.sleep(0.5)  # what the sockets take is written, and the next write waits
    started_s = loop.time()
    assert await listener.close(0.01) is False
    assert loop.time() - started_s < 3
    assert bench.one_closing().status == "cancelled"
    assert 0 < sum(len(output) for output in bench.one_closing().outputs) < 8 * 489
    connection.close()
