"""Server-sent events on one HTTP response."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

_SEND_BUFFER_BYTES = 64 << 10  # the kernel would take megabytes, and call delivered what nobody reads
_SMALL_BYTES = 16 << 10  # a write of so much fits into an empty transport, which holds 64 KiB before it makes its writer wait


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How patient a stream is.

    Attributes:
        write_timeout_s: How long a reader may take nothing of what is written.
        keep_alive_s: After this long without an event a comment is sent, so that no proxy takes silence for death.
    """

    write_timeout_s: float
    keep_alive_s: float
    clock: Callable[[], float]


class EventStream:
    """Writes JSON events. Nothing is sent before the first event or comment: an error until then can be a plain answer."""

    def __init__(self, request: web.Request, limits: StreamLimits) -> None:
        self._request = request
        self._limits = limits
        self._headers: dict[str, str] = {}
        self._response: web.StreamResponse | None = None
        self._writing = asyncio.Lock()
        self._tcp: asyncio.Transport | None = None  # of an open stream
        self._is_chunked = False
        self._written_s = limits.clock()

    @property
    def is_open(self) -> bool:
        """Whether the status line has left."""
        return self._response is not None

    def add_headers(self, headers: dict[str, str]) -> None:
        """Headers that became known; without effect once the stream is open."""
        self._headers.update(headers)

    async def send(self, *events: Any) -> None:
        """`data:` events in one write. Raises ConnectionError when the client is gone, or takes nothing for too long."""
        await self._write(_encoded(events))

    @property
    def is_clear(self) -> bool:
        """Whether an event can be sent at once: the stream is open, and all that was written before has left."""
        tcp = self._tcp
        return not (tcp is None or tcp.is_closing() or tcp.get_write_buffer_size() or self._writing.locked())

    def send_at_once(self, *events: bytes) -> None:
        """`data:` events, as JSON, while the stream `is_clear`: what `send` writes, without a coroutine for every token."""
        data = b"data: %b\n\n" % b"\n\ndata: ".join(events)
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._tcp is None:
            raise ConnectionResetError("the stream is not open")
        self._tcp.write(data)
        self._written_s = self._limits.clock()

    async def close(self, *, has_marker: bool) -> web.StreamResponse:
        """End the response; with OpenAI's end marker, but never on LoRAX's routes: lorax-client parses every event as JSON.

        Raises:
            ConnectionError: As `send`.
        """
        async with self._writing:
            response = await self._opened()
            await self._patiently(response.write_eof(b"data: [DONE]\n\n" if has_marker else b""))
        return response

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Send comments inside this block while nothing else is sent; readers of events pass over them."""
        comments = asyncio.create_task(self._send_comments())
        try:
            yield
        finally:
            comments.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await comments

    async def _send_comments(self) -> None:
        while True:
            rest_s = self._written_s + self._limits.keep_alive_s - self._limits.clock()
            if rest_s > 0:
                await asyncio.sleep(rest_s)
            else:
                await self._write(b":\n\n")

    async def _write(self, data: bytes) -> None:
        response = self._response
        if response is not None and self.is_clear and len(data) <= _SMALL_BYTES:
            await response.write(data)  # cannot wait, so it needs neither lock nor timeout: they cost more than the event
        else:
            await self._write_patiently(data)
        self._written_s = self._limits.clock()

    async def _write_patiently(self, data: bytes) -> None:
        async with self._writing:
            response = await self._opened()
            await self._patiently(response.write(data))

    async def _patiently(self, writing: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await writing
        except TimeoutError as error:
            self._hang_up()
            raise ConnectionResetError("the client took nothing of the stream for too long") from error

    def _hang_up(self) -> None:
        """Not a close: that would wait for the reader to take what is buffered."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def _bound_buffer(self) -> None:
        connection = self._request.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    async def _opened(self) -> web.StreamResponse:
        if self._response is None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **self._headers}
            response = web.StreamResponse(headers=headers)
            response.content_type = "text/event-stream"
            response.charset = "utf-8"
            self._bound_buffer()
            await response.prepare(self._request)
            self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"  # not for HTTP/1.0
            self._response, self._tcp = response, self._request.transport
        return self._response


def _encoded(events: tuple[Any, ...]) -> bytes:
    return b"".join([b"data: %b\n\n" % msgspec.json.encode(event) for event in events])
