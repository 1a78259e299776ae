"""Opens a node: the engine first, which takes longest, and beside it everything else.

The rooms' own imports take seconds, so they begin when the engine's process has begun; nothing here imports one of them.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from node.config import Settings, runtime_dir
from node.engine.client import EngineClient
from node.engine.messages import Ready
from node.errors import ConfigError
from node.exposure import check_exposure
from node.start_notes import StartNotes
from node.telemetry.logs import make_logger
from node.tenancy.key_file import read_key_file

if TYPE_CHECKING:
    from node.app import Node


@asynccontextmanager
async def open_node(settings: Settings) -> AsyncIterator[Node]:
    """Open every room, listen, and on leaving drain and close in the opposite order.

    Raises:
        NodeError: Whatever room cannot open; what was opened before it is closed again.
    """
    check_exposure(settings)
    logger = make_logger(settings.telemetry.log_level, settings.telemetry.log_format)
    note = StartNotes(time.monotonic, functools.partial(_say, logger))
    key_file = settings.server.api_keys_file
    key_lines = () if key_file is None else read_key_file(key_file)
    async with AsyncExitStack() as stack:
        engine = EngineClient(settings, _private_directory(settings))
        stack.push_async_callback(engine.close)
        starting = asyncio.create_task(engine.start(), name="engine-start")
        stack.push_async_callback(_given_up, starting)
        await _import_rooms()
        if starting.done():
            starting.result()  # it failed: no keys and no chain are made for a mistyped model
        from node.app import open_rooms

        note("rooms imported")
        yield await stack.enter_async_context(open_rooms(settings, logger, key_lines, engine, starting, note))


async def _import_rooms() -> None:
    """On a thread, while the event loop starts the engine's process. Half a million objects come and none goes."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        await asyncio.to_thread(importlib.import_module, "node.app")
    finally:
        if was_collecting:
            gc.enable()


def _say(logger: FilteringBoundLogger, done: str, after_s: float, took_s: float) -> None:
    logger.info("start", done=done, after_s=round(after_s, 2), took_s=round(took_s, 2))


async def _given_up(task: asyncio.Task[Ready]) -> None:
    """A start that nobody waits for any more is cancelled; how it ended was heard by who waited, or does not matter now."""
    task.cancel()
    await asyncio.wait([task])


def _private_directory(settings: Settings) -> Path:
    """The directory of the node's sockets, for its own user alone.

    Raises:
        ConfigError: It cannot be made, or somebody else made it first: its name under the temporary directory is no secret.
    """
    directory = runtime_dir(settings)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            directory.chmod(0o700)
            return directory
    except OSError as error:
        raise ConfigError(f"cannot make {directory} for the node's sockets; check the permissions of data_dir") from error
    raise ConfigError(f"{directory} belongs to somebody else or is no directory; remove it or choose a shorter data_dir")
