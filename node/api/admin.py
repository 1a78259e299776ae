"""The operator's door: one POST a command, on a Unix socket that only the node's own user can reach. Never on a network."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from node.errors import NodeError, RequestError

Operation = Callable[..., Awaitable[Any]]
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
        application = web.Application()
        application.add_routes([web.post("/{operation}", self._answer)])
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=_SHUTDOWN_S)

    async def open(self, socket: Path) -> None:
        """Listen on `socket`, which only its owner may connect to. A socket file left by a crash is replaced.

        Args:
            socket: In a directory that only this user can enter, since the file's own mode comes an instant after the file.
        """
        await self._runner.setup()
        await web.UnixSite(self._runner, str(socket)).start()
        os.chmod(socket, 0o600)
        self._socket = socket

    async def close(self) -> None:
        """Stop listening and remove the socket file, which tells the command line that no node runs."""
        await self._runner.cleanup()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

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
