"""A Python process of this node's own: its pipes, its log lines, its end. What is said through the pipes is its users' affair."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import node
from node.errors import ConfigError, NodeError

TAIL_LINES = 40
STOP_TIMEOUT_S = 5.0

_PipeT = TypeVar("_PipeT", asyncio.StreamReader, asyncio.StreamWriter)


class ChildProcess:
    """One started process. Owned by an event loop, which passes on what it writes to stderr.

    Args:
        process: Started with pipes for its input and its stderr.
        logger: Where its lines go.
    """

    def __init__(self, process: asyncio.subprocess.Process, logger: logging.Logger) -> None:
        self._process = process
        self._logger = logger
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log(), name=f"log of {logger.name}")

    @classmethod
    async def start(cls, module: str, *, has_output: bool = False, environment: Mapping[str, str] | None = None) -> ChildProcess:
        """Run `python -m module`, whose lines go to the logger of that name.

        Args:
            has_output: Read its standard output through `output`; else it goes nowhere.
            environment: Added to this process's own.

        Raises:
            ConfigError: The machine does not start it.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # never import from the directory the node happens to be started in
                "-m",
                module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if has_output else asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**child_environment(), **(environment or {})},
                start_new_session=True,  # Ctrl-C goes to the parent alone, which then drains and stops this process
            )
        except OSError as error:
            raise ConfigError(f"the process {module} cannot be started (errno {error.errno}); check the limits") from error
        return cls(process, logging.getLogger(module))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def input(self) -> asyncio.StreamWriter:
        """What it reads as standard input."""
        return _required(self._process.stdin, "an input")

    @property
    def output(self) -> asyncio.StreamReader:
        """What it writes to standard output."""
        return _required(self._process.stdout, "an output")

    @property
    def log_tail(self) -> str:
        """The last lines it wrote to stderr."""
        return "\n".join(self._tail)

    async def wait(self) -> int:
        """Wait for its end and for its last log line; returns the exit status, negative for a signal."""
        status = await self._process.wait()
        await self._reader
        return status

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """End it: close its input and let it go by itself for `grace_s`; then ask, then insist."""
        self.input.close()
        await self._ended_within(grace_s)
        for signal_it in (self._process.terminate, self._process.kill):
            if not self.is_running:
                break
            with contextlib.suppress(ProcessLookupError):
                signal_it()
            await self._ended_within(STOP_TIMEOUT_S)
        await self.wait()

    async def _ended_within(self, timeout_s: float) -> None:
        if timeout_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout_s)

    async def _read_log(self) -> None:
        stream = _required(self._process.stderr, "an error output")
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond the stream's limit; the reader has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            self._logger.log(_level_of(text), "%s", text)


def _level_of(line: str) -> int:
    """What begins with a level's name has that level; the lines of a traceback have none."""
    return logging.getLevelNamesMapping().get(line.partition(" ")[0], logging.INFO)


def child_environment() -> dict[str, str]:
    """This environment, with the directory of this very `node` package first on the module path."""
    root = str(Path(node.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}


def _required(pipe: _PipeT | None, what: str) -> _PipeT:
    if pipe is None:
        raise NodeError(f"the process was started without {what}")
    return pipe
