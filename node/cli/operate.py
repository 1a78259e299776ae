"""Run an operator's command where the data is: inside the running node, or on its files when no node runs.

The ledger has one writer. A running node holds it, so the command travels to that node over the admin socket; otherwise this
process opens the books itself for the length of one command.
"""

from __future__ import annotations

import asyncio
from typing import Any

from node.config import Settings, admin_socket
from node.errors import EngineError, error_from_json

_TIMEOUT_S = 600.0  # an epoch's transactions wait for blocks


def operate(settings: Settings, operation: str, /, **arguments: Any) -> Any:
    """Run `operation` ("epochs.close") and return its JSON answer.

    Raises:
        NodeError: What the operation raised, with its code, whichever process it ran in.
    """
    return asyncio.run(_operate(settings, operation, arguments))


async def _operate(settings: Settings, operation: str, arguments: dict[str, Any]) -> Any:
    if admin_socket(settings).exists():
        import aiohttp  # late, here and below: other commands do without

        try:
            return await _ask_running_node(settings, operation, arguments)
        except aiohttp.ClientConnectorError:
            pass  # a socket file without a listener is what kill -9 leaves behind
    if operation.startswith("adapters."):
        raise EngineError(
            f"no node is running on {settings.data_dir}; adapters are checked against the loaded base model, "
            "so start one first: openlora-node start",
            code="node_not_running",
        )
    if operation.startswith("keys."):
        return await _on_the_ledger_alone(settings, operation, arguments)
    if not (settings.data_dir / "keys").exists():
        raise EngineError(
            f"no node ever ran on {settings.data_dir}; check --data-dir, or start one: openlora-node start",
            code="node_not_running",
        )
    from node.operations import settlement_operations
    from node.settlement.treasury import open_treasury
    from node.telemetry.logs import make_logger

    logger = make_logger(settings.telemetry.log_level, settings.telemetry.log_format)
    async with open_treasury(settings, logger) as treasury:
        return await settlement_operations(treasury)[operation](**arguments)


async def _on_the_ledger_alone(settings: Settings, operation: str, arguments: dict[str, Any]) -> Any:
    """API keys need neither chain nor operator keys, and are made before a node ever ran."""
    import time

    from node.settlement.treasury import ledger_url
    from node.tenancy.key_desk import key_operations
    from node.tenancy.offline import offline_transact
    from node.tenancy.store import TenantStore

    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with offline_transact(ledger_url(settings)) as transact:
        store = TenantStore(transact, lambda: time.time_ns() // 1_000_000)
        await store.load()
        return await key_operations(store)[operation](**arguments)


async def _ask_running_node(settings: Settings, operation: str, arguments: dict[str, Any]) -> Any:
    """Raises ClientConnectorError when nobody listens; every later trouble is an EngineError, since the command may have run."""
    import aiohttp

    connector = aiohttp.UnixConnector(path=str(admin_socket(settings)))
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.post(f"http://node/{operation}", json=arguments) as answer,
        ):
            body = await answer.json()
    except aiohttp.ClientConnectorError:
        raise
    except TimeoutError as error:
        raise EngineError(
            f"the running node did not finish {operation} within {_TIMEOUT_S:g} s; it goes on, ask again later"
        ) from error
    except (aiohttp.ClientError, ValueError) as error:
        raise EngineError(f"the running node broke off during {operation}; look at its log and ask again") from error
    if answer.status != 200:
        raise error_from_json(body)
    return body
