"""Messages between processes of this node: bytes over two pipes, each after its length. What they say is their users' affair."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import IO, Generic, TypeVar

_LENGTH_BYTES = 4

_MessageT = TypeVar("_MessageT")


def framed(content: bytes) -> bytes:
    """A message as it goes through a pipe."""
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def read_message(pipe: IO[bytes], limit_bytes: int) -> bytes | None:
    """The next message; None where the pipe ended, however much of one had come, or where it announces more than the limit."""
    head = pipe.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    content = pipe.read(length) if len(head) == _LENGTH_BYTES and length <= limit_bytes else b""
    return content if content and len(content) == length else None


async def next_message(pipe: asyncio.StreamReader, limit_bytes: int) -> bytes | None:
    """As `read_message`, on an event loop."""
    try:
        length = int.from_bytes(await pipe.readexactly(_LENGTH_BYTES), "little")
        return None if length > limit_bytes else await pipe.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Outlet(Generic[_MessageT]):
    """A child's way up. Any thread may send.

    Args:
        pack: A message as it goes through the pipe.
    """

    def __init__(self, pipe: IO[bytes], pack: Callable[[_MessageT], bytes]) -> None:
        self._pipe = pipe
        self._pack = pack
        self._lock = threading.Lock()

    @classmethod
    def of_stdout(cls, pack: Callable[[_MessageT], bytes]) -> Outlet[_MessageT]:
        """Take standard output for messages alone: a library that prints must not speak in our name."""
        outlet = cls(os.fdopen(os.dup(1), "wb"), pack)
        os.dup2(2, 1)
        return outlet

    def send(self, message: _MessageT) -> None:
        """Send one message, whole. A parent that is gone hears nothing, and its end of the input stops this process."""
        content = self._pack(message)
        with self._lock:
            try:
                self._pipe.write(content)
                self._pipe.flush()
            except BrokenPipeError:
                return
