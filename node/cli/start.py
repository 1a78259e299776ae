"""`openlora-node start`: open the rooms, say where everything is, serve until SIGTERM, drain. A start can be stopped as well."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.options import ConfigOption, DataDirOption, settings_from
from node.config import Settings

if TYPE_CHECKING:
    from node.app import Node

_SWITCH_INTERVAL_S = 0.0005


def start(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Listen here; beyond loopback API keys or --insecure are needed.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free port.")] = None,
    data_dir: DataDirOption = None,
    model: Annotated[str | None, typer.Option(help="A directory, a .gguf file or a hub id.")] = None,
    adapters_dir: Annotated[Path | None, typer.Option(help="Serve every adapter in this directory.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other hosts without API keys.")] = False,
) -> None:
    """Serve. Without options: the embedded model, three demo adapters, a local ledger and a development chain.

    Examples:

        openlora-node start

        openlora-node start --model Qwen/Qwen3-0.6B --adapters-dir ./adapters --port 9000
    """
    settings = settings_from(
        config,
        data_dir,
        server_host=host,
        server_port=port,
        server_insecure=insecure or None,
        model_path=model,
        adapters_directory=adapters_dir.expanduser().absolute() if adapters_dir else None,
    )
    import uvloop

    # Threads that read the ledger or a long prompt wait for the interpreter lock at most so long, however busy the event loop is.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from node.opening import open_node
    from node.telemetry.logs import make_logger, passing_on

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_once, stop, loop)
    async with AsyncExitStack() as stack:
        stack.enter_context(passing_on(make_logger(settings.telemetry.log_level, settings.telemetry.log_format)))
        node = await _opened(stack, open_node(settings), stop)
        if node is None:
            typer.echo("stopped before it served")
            return
        typer.echo(node.banner())
        await stop.wait()
        typer.echo("draining: new requests are refused, running ones finish")


async def _opened(stack: AsyncExitStack, opening: AbstractAsyncContextManager[Node], stop: asyncio.Event) -> Node | None:
    """The node, to be closed by the stack; None where `stop` came first: a large model takes minutes, for nobody then."""
    patience = asyncio.timeout(None)
    watch = asyncio.create_task(_give_up(stop, patience), name="start-watch")
    try:
        async with patience:
            return await stack.enter_async_context(opening)
    except TimeoutError:
        if not patience.expired():
            raise
        return None
    finally:
        watch.cancel()


async def _give_up(stop: asyncio.Event, patience: asyncio.Timeout) -> None:
    await stop.wait()
    patience.reschedule(0)


def _stop_once(stop: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    """Drain, or give up the start, on the first signal; a second one finds the default action and ends the process at once."""
    stop.set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
