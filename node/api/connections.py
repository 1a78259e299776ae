"""The listening site, which lets one address have only so many connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from aiohttp import web

_REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 38\r\n\r\ntoo many connections from this address"
)


class BoundedSite(web.BaseSite):
    """A TCP site. Beyond the limit a connection is answered 429 and closed before anything of it is read.

    An address that holds idle connections open would otherwise hold the process's descriptors, which belong to everybody.
    """

    def __init__(self, runner: web.AppRunner, host: str, port: int, max_per_address: int) -> None:
        super().__init__(runner)
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
        return server() if count < self._max_per_address else None


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
