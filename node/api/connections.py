"""The listening site and its connections: so many an address, and our own words for bytes that are no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
from aiohttp import web

from node.api.errors import openai_body
from node.errors import RequestError

_REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 38\r\n\r\ntoo many connections from this address"
)


class Connection(web.RequestHandler):
    """aiohttp's answers malformed requests with its parser's text, and logs a traceback of each: strangers could fill the log."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """A refusal without the parser's words; the connection is closed."""
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        error = RequestError("the bytes sent are not a well-formed HTTP request within this node's limits", code="invalid_http")
        response = web.Response(status=status, body=msgspec.json.encode(openai_body(error)), content_type="application/json")
        response.force_close()
        return response


class BoundedSite(web.BaseSite):
    """A TCP site. Beyond the limit a connection is answered 429 and closed before anything of it is read.

    An address that holds idle connections open would otherwise hold the process's descriptors, which belong to everybody.

    Args:
        options: aiohttp's, of each connection: line and header sizes, timeouts.
    """

    def __init__(
        self, runner: web.AppRunner, host: str, port: int, max_per_address: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(runner)
        self._options: dict[str, Any] = {"access_log": None, **(options or {})}
        self._host = host
        self._port = port
        self._max_per_address = max_per_address

    @property
    def name(self) -> str:
        """Its URL."""
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen; raises OSError where that is not possible."""
        await super().start()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Doorkeeper(self._admit), self._host, self._port, backlog=self._backlog)

    def _admit(self, transport: asyncio.Transport) -> asyncio.Protocol | None:
        server = self._runner.server
        if server is None:
            return None
        address = _address(transport)
        count = sum(1 for connection in server.connections if _address(connection.transport) == address)
        if count >= self._max_per_address:
            return None
        return Connection(server, loop=asyncio.get_running_loop(), **self._options)


class _Doorkeeper(asyncio.Protocol):
    """A connection's first protocol: hands it to the server's own, or refuses it."""

    def __init__(self, admit: Callable[[asyncio.Transport], asyncio.Protocol | None]) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Decide."""
        tcp = cast(asyncio.Transport, transport)
        protocol = self._admit(tcp)
        if protocol is None:
            tcp.write(_REFUSAL)
            tcp.close()
            return
        tcp.set_protocol(protocol)
        protocol.connection_made(tcp)


def _address(transport: asyncio.BaseTransport | None) -> str | None:
    peer = transport.get_extra_info("peername") if transport is not None else None
    return peer[0] if peer else None
