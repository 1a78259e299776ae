"""The listening socket: opens, and closes by draining."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from node.api.acceptor import reserve_descriptors
from node.api.application import GATE, SERVER, TURNSTILE
from node.api.connections import BoundedSite
from node.api.turnstile import Turnstile
from node.errors import ConfigError

_MAX_HEADER_BYTES = 8190
_AFTER_DRAIN_S = 0.5  # for last answers to leave: aiohttp waits so long twice, then cuts off whoever takes nothing
_CLOSE_BOOKS_S = 10.0
_LINGER_S = 1.0  # reading the rest of a refused body, before the connection is closed


class Listener:
    """One HTTP server on one address. `open` to start; `close` drains.

    Handlers are cancelled when their client hangs up: that is what stops a generation within a step.
    """

    def __init__(self, application: web.Application) -> None:
        self._application = application
        self._server = application[SERVER]
        self._runner = web.AppRunner(
            application,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_AFTER_DRAIN_S,
        )

    async def open(self, host: str, port: int) -> int:
        """Listen.

        Args:
            port: 0 takes any free one.

        Returns:
            The port in use.

        Raises:
            ConfigError: port_in_use, or an address this machine does not have.
        """
        options = {
            "max_line_size": _MAX_HEADER_BYTES,
            "max_field_size": _MAX_HEADER_BYTES,
            "lingering_time": _LINGER_S,
            "keepalive_timeout": self._server.idle_timeout_s,
        }
        turnstile = self._application[TURNSTILE]
        return await listen(self._runner, host, port, self._server.max_connections_per_address, turnstile, options)

    async def close(self, drain_timeout_s: float) -> bool:
        """Refuse new requests, let those inside finish, cancel what is left, stop listening. What is cancelled is recorded so and
        answered with an error.

        Returns:
            Whether every request finished by itself.
        """
        gate = self._application[GATE]
        is_drained = await gate.drain(drain_timeout_s)
        if not is_drained:
            gate.dismiss()
            await gate.drain(_CLOSE_BOOKS_S)
        await self._runner.cleanup()
        return is_drained


async def listen(
    runner: web.AppRunner,
    host: str,
    port: int,
    max_per_address: int,
    turnstile: Turnstile,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Set a runner up on an address; returns the port in use.

    Raises:
        ConfigError: port_in_use, or an address this machine does not have. The runner is cleaned up again.
    """
    reserve_descriptors()
    await runner.setup()
    try:
        await BoundedSite(runner, host, port, max_per_address, turnstile, options).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use by another program; choose one with --port, or 0 for any free port",
                code="port_in_use",
            ) from error
        raise ConfigError(f"cannot listen on {host} port {port}; check server.host, server.port and server.admin_port") from error
    bound: int = runner.addresses[0][1]
    return bound
