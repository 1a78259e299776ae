"""Messages over pipes: whole, in order, within their limit, or not at all."""

import asyncio
import io
import os

import pytest

from node.child_messages import Outlet, framed, next_message, read_message


def test_read_message_gives_each_message_whole_and_then_none():
    pipe = io.BytesIO(framed(b"one") + framed(b"two"))

    assert [read_message(pipe, 16) for _ in range(3)] == [b"one", b"two", None]


@pytest.mark.parametrize("sent", [b"", b"\x05", framed(b"hello")[:-1], framed(b"x" * 17)])
async def test_what_is_cut_off_or_too_long_is_no_message(sent):
    reader = asyncio.StreamReader()
    reader.feed_data(sent)
    reader.feed_eof()

    assert read_message(io.BytesIO(sent), 16) is None
    assert await next_message(reader, 16) is None


async def test_next_message_gives_what_an_outlet_sent():
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    with os.fdopen(theirs, "wb") as pipe:
        Outlet(pipe, lambda text: framed(text.encode())).send("hello")
    with os.fdopen(ours, "rb") as pipe:
        reader.feed_data(pipe.read())

    assert await next_message(reader, 16) == b"hello"


def test_send_to_a_parent_that_is_gone_says_nothing():
    ours, theirs = os.pipe()
    os.close(ours)
    pipe = os.fdopen(theirs, "wb", buffering=0)

    Outlet(pipe, framed).send(b"hello")

    pipe.close()
