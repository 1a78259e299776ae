"""Streams that are slow at either end: comments while nothing comes, an end where nothing is taken; bounded connections."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from node.api.application import build_application
from node.api.listener import Listener

STREAM = {"model": "alice", "prompt": "hi", "max_tokens": 32, "stream": True}


@pytest.fixture
async def serve(make_bench):
    """Start a listener with these server settings; closed again at the end."""
    listeners = []

    async def start(**server):
        bench = make_bench(**server)
        listener = Listener(build_application(bench.services))
        listeners.append(listener)
        return bench, await listener.open("127.0.0.1", 0)

    yield start
    for listener in listeners:
        await listener.close(0.01)


def request(path, body):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", STREAM), ("/generate_stream", {"inputs": "hi", "parameters": {"adapter_id": "alice"}})]
)
@pytest.mark.parametrize("tokens_before", [0, 2])
async def test_stream_with_nothing_to_say_sends_comments(serve, path, body, tokens_before):
    bench, port = await serve(keep_alive_s=0.01)
    bench.engine.hold_after = tokens_before
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(path, body))
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert b"x-openlora-receipt" in head.lower()
    for _ in range(3):
        await asyncio.wait_for(reader.readuntil(b":\n\n"), 10)
    writer.close()
    await asyncio.wait_for(bench.books.closed_event.wait(), 10)
    assert (bench.one_closing().status, len(bench.one_closing().outputs[0])) == ("cancelled", tokens_before)


async def test_error_before_admission_keeps_its_status(serve):
    _, port = await serve(keep_alive_s=0.001)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("/v1/completions", {**STREAM, "model": "nobody"}))
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 404")
    writer.close()


@pytest.mark.parametrize("choices", [1, 8])  # one is written where it is read from the engine, several by a task
async def test_reader_that_takes_nothing_is_cancelled_and_pays_for_what_was_delivered(serve, choices):
    bench, port = await serve(write_timeout_s=0.2)
    bench.engine.answer_ids = [65] * 490
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "alice", "messages": messages, "stream": True, "max_tokens": 490, "temperature": 1}
    body |= {"n": choices, "logprobs": True, "top_logprobs": 20}
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(connection, request("/v1/chat/completions", body))
    await asyncio.wait_for(bench.books.closed_event.wait(), 30)
    connection.close()
    closing = bench.one_closing()
    delivered = [len(output) for output in closing.outputs]
    assert closing.status == "cancelled"
    assert 0 < sum(delivered) < choices * 490
    assert len(bench.engine.cancelled) >= 1


async def test_address_with_too_many_connections_is_answered_429_and_others_are_served(serve):
    _, port = await serve(max_connections_per_address=2)
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    held[0][1].write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await held[0][0].readline()).startswith(b"HTTP/1.1 200")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 429")
    writer.close()
    reader, other = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
    other.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 200")
    for _, writer in [*held, (None, other)]:
        writer.close()


async def test_connection_without_a_request_is_closed(serve):
    _, port = await serve(idle_timeout_s=0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /live HTT")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def events_of(reader):
    """Parsed `data:` events up to the end marker."""
    found = []
    while True:
        line = await asyncio.wait_for(reader.readline(), 10)
        if line.startswith(b"data: [DONE]"):
            return found
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_token_is_a_chunk_of_the_same_frame_with_its_text(serve, path):
    bench, port = await serve()
    bench.engine.answer = 'hello "wor\\ld"\n' * 3
    body = {**STREAM, "messages": [{"role": "user", "content": "hi"}]}
    del body["prompt" if "chat" in path else "messages"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(path, body))
    events = await events_of(reader)
    choices = [choice for event in events for choice in event["choices"]]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices]
    assert "".join(texts) == bench.engine.answer
    assert len([text for text in texts if text]) > 10
    assert len({json.dumps({key: event[key] for key in ("id", "object", "created", "model")}) for event in events}) == 1
    assert len({tuple(choice) for choice in choices[2:-1]}) == 1
    writer.close()


async def test_chat_announces_the_role_first_also_behind_a_comment(serve):
    bench, port = await serve(keep_alive_s=0.01)
    bench.engine.may_begin = asyncio.Event()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = {"model": "alice", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    writer.write(request("/v1/chat/completions", body))
    await asyncio.wait_for(reader.readuntil(b":\n\n"), 10)
    bench.engine.may_begin.set()
    events = await events_of(reader)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == bench.engine.answer
    assert len(deltas) > 3
    writer.close()


async def test_stream_to_a_client_without_chunks_ends_with_the_connection(serve):
    bench, port = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("/v1/completions", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    lines = [line for line in (await asyncio.wait_for(reader.read(), 10)).split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == bench.engine.answer
    writer.close()
