"""The listening site and its connections: so many an address, and our own words for bytes that are no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from node.api.errors import openai_body
from node.api.turnstile import Begin, Turnstile
from node.errors import RequestError

_BACKLOG = 1024  # connections that wait to be accepted; one that finds no room there tries again after a whole second
_REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 38\r\n\r\ntoo many connections from this address"
)


class Connection(web.RequestHandler):
    """aiohttp's answers malformed requests with its parser's text, and logs a traceback of each: strangers could fill the log.

    Attributes:
        is_known: Whether a request has come through it before.
    """

    __slots__ = ("_left", "is_known")

    def __init__(self, manager: web.Server, left: Callable[[], None], **options: Any) -> None:
        super().__init__(manager, **options)
        self._left = left
        self.is_known = False

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self._left()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """A refusal without the parser's words; the connection is closed. Whoever hung up gets none.

        Raises:
            ConnectionError: Whoever asked is gone: aiohttp ends the connection on it without a word in the log.
        """
        if isinstance(exc, ConnectionError):
            raise exc
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        error = RequestError("the bytes sent are not a well-formed HTTP request within this node's limits", code="invalid_http")
        response = web.Response(status=status, body=msgspec.json.encode(openai_body(error)), content_type="application/json")
        response.force_close()
        return response


def take_turns(turnstile: Turnstile) -> Middleware:
    """Let requests on connections that were here before begin one at a time. A connection's first one had its turn when the
    connection came in."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        if isinstance(connection, Connection):
            if connection.is_known:
                await turnstile.again()
            connection.is_known = True
        return await handler(request)

    return middleware


class BoundedSite(web.BaseSite):
    """A TCP site. Beyond the limit a connection is answered 429 and closed before anything of it is read; the others come in one
    at a time.

    An address that holds idle connections open would otherwise hold the process's descriptors, which belong to everybody.

    Args:
        options: aiohttp's, of each connection: line and header sizes, timeouts.
    """

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        max_per_address: int,
        turnstile: Turnstile,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(runner, backlog=_BACKLOG)
        self._options: dict[str, Any] = {"access_log": None, **(options or {})}
        self._host = host
        self._port = port
        self._max_per_address = max_per_address
        self._turnstile = turnstile
        self._held: dict[str, int] = {}

    @property
    def name(self) -> str:
        """Its URL."""
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen; raises OSError where that is not possible."""
        await super().start()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Doorkeeper(self), self._host, self._port, backlog=self._backlog)

    def take_place(self, address: str) -> bool:
        """Count a connection of an address, where it may have one more."""
        held = self._held.get(address, 0)
        if held >= self._max_per_address or self._runner.server is None:
            return False
        self._held[address] = held + 1
        return True

    def leave_place(self, address: str) -> None:
        """Give a place back."""
        self._held[address] -= 1
        if not self._held[address]:
            del self._held[address]

    def let_in(self, begin: Begin) -> None:
        """Call `begin` when it is a new connection's turn."""
        self._turnstile.come(begin)

    def connection(self, left: Callable[[], None]) -> asyncio.Protocol | None:
        """The server's own protocol for a connection; None while it stops."""
        server = self._runner.server
        return None if server is None else Connection(server, left, loop=asyncio.get_running_loop(), **self._options)


class _Doorkeeper(asyncio.Protocol):
    """A connection's first protocol: refuses it, or hands it to the server's own when its turn comes, with what it has said."""

    def __init__(self, site: BoundedSite) -> None:
        self._site = site
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Decide."""
        tcp = cast(asyncio.Transport, transport)
        peer = tcp.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        if not self._site.take_place(self._address):
            self._address = ""
            tcp.write(_REFUSAL)
            tcp.close()
            return
        self._transport = tcp
        self._site.let_in(self._hand_over)

    def data_received(self, data: bytes) -> None:
        """Keep what comes before its turn, and read no more until then."""
        if self._transport is not None:
            self._heard += data
            self._transport.pause_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It hung up while it waited."""
        if self._transport is not None:
            self._transport = None
            self._leave()

    def _leave(self) -> None:
        self._site.leave_place(self._address)

    def _hand_over(self) -> bool:
        tcp, self._transport = self._transport, None
        if tcp is None:
            return False
        protocol = self._site.connection(self._leave)
        if protocol is None or tcp.is_closing():
            self._leave()
            tcp.abort()
            return False
        tcp.set_protocol(protocol)
        protocol.connection_made(tcp)
        if self._heard:
            tcp.resume_reading()
            protocol.data_received(self._heard)
        return True
