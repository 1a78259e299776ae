"""Bytes on the socket that no well-behaved client sends: refused, connection closed, node healthy."""

from __future__ import annotations

import asyncio

import pytest

from node.api.application import build_application
from node.api.listener import Listener

BODY = b'{"model": "", "prompt": "hi"}'
POST = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
RAW = {
    "two content lengths": POST + b"Host: localhost\r\nContent-Length: 5\r\nContent-Length: 29\r\n\r\n" + BODY,
    "length and chunked": POST + b"Host: localhost\r\nContent-Length: 29\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size overflow": POST + b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
    "obsolete folding": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n folded\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n",
    "huge header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
}


async def exchange(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.fixture
async def port(bench):
    listener = Listener(build_application(bench.services))
    yield await listener.open("127.0.0.1", 0)
    await listener.close(1.0)


@pytest.mark.parametrize("name", RAW)
async def test_malformed_http_is_refused_and_the_connection_closed(bench, port, name):
    answer = await exchange(port, RAW[name])
    assert answer == b"" or answer.split()[1] in (b"400", b"431")
    assert answer == b"" or b'"code":"invalid_http"' in answer
    assert bench.books.opened == []
    healthy = await exchange(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert healthy.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", [b"//v1/completions", b"/v1/./completions/", b"/v1/completions/../../admin"])
async def test_path_tricks_reach_nothing(port, path):
    request = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = await exchange(port, request + b"Content-Length: 29\r\n\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 404")


async def test_slow_body_is_408(make_bench):
    listener = Listener(build_application(make_bench(body_timeout_s=0.05).services))
    port = await listener.open("127.0.0.1", 0)
    answer = await exchange(port, POST + b"Host: localhost\r\nConnection: close\r\nContent-Length: 29\r\n\r\n" + BODY[:5])
    await listener.close(1.0)
    assert answer.startswith(b"HTTP/1.1 408")


async def test_a_client_that_is_gone_when_it_is_written_to_leaves_no_traceback(bench, port, caplog):
    async def gone(opening):
        raise ConnectionResetError("cannot write to a closing transport")

    bench.books.open = gone
    answer = await exchange(port, POST + b"Host: localhost\r\nContent-Length: 29\r\n\r\n" + BODY)
    assert answer == b""
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
