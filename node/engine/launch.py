"""Starting the engine process, and what it is told. No torch here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from node.child_process import ChildProcess
from node.config import Settings
from node.errors import ConfigError

MAX_SOCKET_PATH_BYTES = 107  # sun_path of a Unix socket address on Linux


class LaunchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The one line on the engine's standard input: settings sections as JSON objects, and directories."""

    model: dict[str, Any]
    engine: dict[str, Any]
    adapters: dict[str, Any]
    runtime_dir: str
    state_dir: str
    high_water_mark: int


async def launch_engine(settings: Settings, runtime_dir: Path, high_water_mark: int) -> ChildProcess:
    """Start a process whose sockets lie in `runtime_dir`, which is made private.

    Raises:
        ConfigError: The directory's path is too long for a Unix socket, or the process cannot be started.
    """
    path_bytes = len(os.fsencode(runtime_dir / "commands"))
    if path_bytes > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the engine's socket {runtime_dir / 'commands'} has {path_bytes} bytes; Unix sockets allow "
            f"{MAX_SOCKET_PATH_BYTES}; choose a shorter data_dir"
        )
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime_dir.chmod(0o700)
    config = LaunchConfig(
        model=settings.model.model_dump(mode="json"),
        engine=settings.engine.model_dump(mode="json"),
        adapters=settings.adapters.model_dump(mode="json"),
        runtime_dir=str(runtime_dir),
        state_dir=str(settings.data_dir / "engine"),
        high_water_mark=high_water_mark,
    )
    started = await ChildProcess.start("node.engine.process")
    started.input.write(msgspec.json.encode(config) + b"\n")
    return started
