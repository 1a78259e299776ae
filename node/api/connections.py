"""The listening site and its connections: so many an address, and our own words for bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from node.api.acceptor import Acceptor, bound
from node.api.errors import openai_body
from node.api.turnstile import Turnstile
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
        self._left: Callable[[], None] | None = left
        self.is_known = False

    def leave(self) -> None:
        """Give its place back, once."""
        left, self._left = self._left, None
        if left is not None:
            left()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self.leave()
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
    at a time. Until then they are sockets that nobody listens to: a transport and a protocol of each would cost the loop more
    than a token.

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
        self._waiting: set[socket.socket] = set()
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """Its URL."""
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen; raises OSError where that is not possible."""
        await super().start()
        sockets = await bound(self._host, self._port, self._backlog)
        self._server = cast(asyncio.AbstractServer, Acceptor(sockets, self._accepted))

    async def stop(self) -> None:
        """Listen no more; who waited is let go."""
        await super().stop()
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()

    def _accepted(self, connection: socket.socket, address: str) -> None:
        if not self._take_place(address):
            with contextlib.suppress(OSError):  # gone already
                connection.send(_REFUSAL)
            connection.close()
            return
        self._waiting.add(connection)
        self._turnstile.come(functools.partial(self._begin, connection, address))

    def _take_place(self, address: str) -> bool:
        """Count a connection of an address, where it may have one more."""
        held = self._held.get(address, 0)
        if held >= self._max_per_address or self._runner.server is None:
            return False
        self._held[address] = held + 1
        return True

    def _leave_place(self, address: str) -> None:
        self._held[address] -= 1
        if not self._held[address]:
            del self._held[address]

    def _begin(self, connection: socket.socket, address: str) -> bool:
        """It is its turn, unless it hung up while it waited, or the site has stopped."""
        if connection not in self._waiting:
            return False
        self._waiting.remove(connection)
        server = self._runner.server
        if server is None or _has_hung_up(connection):
            self._leave_place(address)
            connection.close()
            return False
        loop = asyncio.get_running_loop()
        protocol = Connection(server, functools.partial(self._leave_place, address), loop=loop, **self._options)
        opening = loop.create_task(self._open(protocol, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, protocol: Connection, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # lost between two calls
            connection.close()
            protocol.leave()


def _has_hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
