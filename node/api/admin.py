"""The operator's door: one POST a command, on a Unix socket that only the node's own user can reach. Never on a network."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from node.errors import NodeError

Operation = Callable[..., Awaitable[Any]]


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
        self._runner = web.AppRunner(application, access_log=None)

    async def open(self, socket: Path) -> None:
        """Listen on `socket`, in a directory of mode 0700. A socket file left by a crash is replaced."""
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(socket.parent, 0o700)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(socket)).start()
        self._socket = socket

    async def close(self) -> None:
        """Stop listening and remove the socket file, which tells the command line that no node runs."""
        await self._runner.cleanup()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    async def _answer(self, request: web.Request) -> web.Response:
        name = request.match_info["operation"]
        operation = self._operations.get(name)
        if operation is None:
            return _refusal(
                404, NodeError(f"this node has no operation {name}; start its version again", code="operation_unknown")
            )
        try:
            return web.json_response(await operation(**await request.json()))
        except NodeError as error:
            return _refusal(400, error)
        except Exception:
            self._logger.exception("operation_failed", operation=name)
            return _refusal(500, NodeError(f"{name} failed inside the node; its log says why"))


def _refusal(status: int, error: NodeError) -> web.Response:
    """`kind` lets the command line raise the same class, and so end with the exit code of having done the work itself."""
    body = {"kind": type(error).__name__, "code": error.error_code, "message": error.message}
    return web.json_response(body, status=status)
