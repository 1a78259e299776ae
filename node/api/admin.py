"""The operator's door: one POST a command, on a Unix socket that only the node's own user can reach, and, where
`server.admin_port` asks for it, on a loopback port for keys with the scope admin. Never on the public listener.

Every user of the machine, and every page in a browser on it, can reach a loopback port. So it needs a key also on a node that
serves everybody, and answers only where it is addressed by a loopback name (`loopback`).
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from structlog.typing import FilteringBoundLogger

from node.api.errors import error_headers, meaning_of
from node.api.listener import listen
from node.api.loopback import is_addressed_as_loopback
from node.api.turnstile import Turnstile
from node.errors import AuthError, NodeError, RequestError
from node.tenancy.api_key import Scope
from node.tenancy.door import Door, check_scope

Operation = Callable[..., Awaitable[Any]]
ADMIN_HOST = "127.0.0.1"
_MAX_CONNECTIONS = 64  # of the one address that reaches the port
_SHUTDOWN_S = 1.0  # an operation that waits for the chain is cut short: what it asked for is in the ledger


class AdminListener:
    """Serves operations ("epochs.close") by name; the body holds their arguments, the answer what they return.

    Args:
        operations: Every value is JSON in, JSON out.
        logger: For what is not a `NodeError`: those are answers.
    """

    def __init__(self, operations: Mapping[str, Operation], logger: FilteringBoundLogger) -> None:
        self._operations = operations
        self._logger = logger
        self._socket: Path | None = None
        self._runner = self._make_runner()
        self._port_runner: web.AppRunner | None = None

    async def open(self, socket: Path) -> None:
        """Listen on `socket`, which only its owner may connect to. A socket file left by a crash is replaced.

        Args:
            socket: In a directory that only this user can enter, since the file's own mode comes an instant after the file.
        """
        await self._runner.setup()
        await web.UnixSite(self._runner, str(socket)).start()
        os.chmod(socket, 0o600)
        self._socket = socket

    async def open_port(self, port: int, door: Door) -> int:
        """Listen on 127.0.0.1 as well, for keys with the scope admin; returns the port in use.

        Raises:
            ConfigError: port_in_use.
        """
        self._port_runner = self._make_runner(_for_admins(door))
        return await listen(self._port_runner, ADMIN_HOST, port, _MAX_CONNECTIONS, Turnstile())

    async def close(self) -> None:
        """Stop listening and remove the socket file, which tells the command line that no node runs."""
        if self._port_runner is not None:
            await self._port_runner.cleanup()
        await self._runner.cleanup()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    def _make_runner(self, *middlewares: Middleware) -> web.AppRunner:
        application = web.Application(middlewares=middlewares)
        application.add_routes([web.post("/{operation}", self._answer)])
        return web.AppRunner(application, access_log=None, shutdown_timeout=_SHUTDOWN_S)

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._run(request.match_info["operation"], await request.read()))
        except NodeError as error:
            return web.json_response(error.to_json(), status=400)
        except Exception:
            self._logger.exception("operation_failed", operation=request.match_info["operation"])
            return web.json_response(NodeError("the operation failed inside the node; its log says why").to_json(), status=500)

    async def _run(self, name: str, body: bytes) -> Any:
        operation = self._operations.get(name)
        if operation is None:
            raise RequestError(f"this node has no operation {name[:80]!r}; start it again with the version of this command")
        try:
            arguments = json.loads(body)
            inspect.signature(operation).bind(**arguments)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{name} takes a JSON object with its own arguments; use this version's command") from error
        return await operation(**arguments)


def _for_admins(door: Door) -> Middleware:
    """Let in nobody but holders of a key with the scope admin."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if not is_addressed_as_loopback(request):
                raise RequestError("this port is for this machine alone; address it as 127.0.0.1")
            principal = door.identify(request.headers.getall("Authorization", []), request.remote or "")
            if principal.key_id is None:
                raise AuthError(
                    "this port needs a key with the scope admin; make one: openlora-node keys create NAME --scope admin"
                )
            check_scope(principal, frozenset({Scope.ADMIN}))
        except NodeError as error:
            return web.json_response(error.to_json(), status=meaning_of(error).status, headers=error_headers(error))
        return await handler(request)

    return middleware
