"""Starting the engine process: what it is told, and what is heard of it when it fails. No torch here."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

import node
from node.config import Settings
from node.errors import ConfigError

MAX_SOCKET_PATH_BYTES = 107  # sun_path of a Unix socket address on Linux
TAIL_LINES = 40
STOP_TIMEOUT_S = 5.0


class LaunchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The one line on the engine's standard input: settings sections as JSON objects, and directories."""

    model: dict[str, Any]
    engine: dict[str, Any]
    adapters: dict[str, Any]
    runtime_dir: str
    state_dir: str
    high_water_mark: int


class EngineProcess:
    """One started engine process. Owned by the client's event loop."""

    def __init__(self, process: asyncio.subprocess.Process, logger: logging.Logger) -> None:
        self._process = process
        self._logger = logger
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log(), name="engine-log")

    @classmethod
    async def launch(cls, settings: Settings, runtime_dir: Path, high_water_mark: int) -> EngineProcess:
        """Start a process whose sockets lie in `runtime_dir`, which is made private.

        Raises:
            ConfigError: The directory's path is too long for a Unix socket.
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
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # never import from the directory the node happens to be started in
            "-m",
            "node.engine.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C goes to the parent alone, which then drains and stops this process
        )
        started = cls(process, logging.getLogger("node.engine.process"))
        if process.stdin is not None:
            process.stdin.write(msgspec.json.encode(config) + b"\n")
        return started

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def log_tail(self) -> str:
        """The last lines it wrote."""
        return "\n".join(self._tail)

    async def wait(self) -> int:
        """Wait for its end and for its last log line; returns the exit status, negative for a signal."""
        status = await self._process.wait()
        await self._reader
        return status

    async def stop(self) -> None:
        """End it now: ask, then insist."""
        for signal_it in (self._process.terminate, self._process.kill):
            if not self.is_running:
                break
            signal_it()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                continue
        await self.wait()

    async def _read_log(self) -> None:
        stream = self._process.stderr
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond the stream's limit; the reader has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            self._logger.info("%s", text)


def _environment() -> dict[str, str]:
    """This environment, with the directory of this very `node` package first on the module path."""
    root = str(Path(node.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}
