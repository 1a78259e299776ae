"""The API process's end of the fetching process: start it, ask it, start it again. Imports no source's library.

When the process is lost, every job under way ends with `source_unavailable` and another one is started; adapters that are known
are served meanwhile. A download that broke off goes on where it stopped when it is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

import msgspec

import node
from node.adapters.fetching.door import FetchedAdapter
from node.adapters.fetching.messages import (
    LENGTH_BYTES,
    MAX_MESSAGE_BYTES,
    Answer,
    Downloads,
    Event,
    Failed,
    FetchConfig,
    Fetched,
    ListProgress,
    Resolve,
    Started,
    StartFailed,
    Verified,
    Verify,
    event_decoder,
    packed,
)
from node.adapters.staging import Progress
from node.adapters.verify import VerifiedAdapter
from node.config import Settings
from node.errors import AdapterUnavailableError, ConfigError, NodeError, error_from_json
from node.request import LinearShape

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 3.0
RESTART_DELAY_S = 0.5  # doubled after each start that fails
MAX_RESTART_DELAY_S = 30.0
MAX_JOBS = 4096
TAIL_LINES = 20
RETRY_AFTER_S = 5.0

_AnswerT = TypeVar("_AnswerT", bound=msgspec.Struct)
logger = logging.getLogger(__name__)


class FetchClient:
    """Talks to one fetching process. All methods are for one event loop.

    Args:
        settings: The node's settings; `adapters` and `data_dir` matter here.
        linears, base_id: The base model, from the engine's `Ready`.
        hub_endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
    """

    def __init__(
        self, settings: Settings, linears: Sequence[LinearShape], base_id: str, *, hub_endpoint: str | None = None
    ) -> None:
        self._config = FetchConfig(
            adapters=settings.adapters.model_dump(mode="json"),
            data_dir=str(settings.data_dir),
            linears=tuple(linears),
            base_id=base_id,
            hub_endpoint=hub_endpoint,
        )
        self._decoder = event_decoder()
        self._ids = count()
        self._jobs: dict[int, asyncio.Future[Answer]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._input: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._log: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, for the doctor and for tests."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether a child takes jobs now."""
        return self._input is not None

    # ---- life

    async def start(self) -> None:
        """Start the process and wait until it takes jobs.

        Raises:
            ConfigError: The settings of the sources make no sense, or the process cannot be started.
        """
        try:
            await self._launch()
        except NodeError:
            await self._discard()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="fetch-supervisor")

    async def close(self) -> None:
        """Tell the process to stop, and end it when it does not."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._discard()

    # ---- jobs

    async def resolve(self, source: str, name: str, token: str | None, *, is_known: bool = False) -> FetchedAdapter:
        """See `door.Fetcher`."""
        return (await self._ask(lambda job_id: Resolve(job_id, source, name, token, is_known), Fetched)).found

    async def verify(self, directory: Path) -> VerifiedAdapter:
        """See `door.Fetcher`."""
        return (await self._ask(lambda job_id: Verify(job_id, str(directory)), Verified)).verified

    async def progress(self) -> Sequence[Progress]:
        """See `door.Fetcher`."""
        return (await self._ask(ListProgress, Downloads)).items

    async def _ask(self, make: Callable[[int], msgspec.Struct], kind: type[_AnswerT]) -> _AnswerT:
        if self._input is None:
            raise _unavailable("adapters cannot be fetched or checked now: the process that does is being started")
        if len(self._jobs) >= MAX_JOBS:
            raise AdapterUnavailableError(
                f"{MAX_JOBS} adapters are being fetched and checked; try again in a moment",
                code="adapter_queue_full",
                retry_after_s=1.0,
            )
        job_id = next(self._ids)
        self._jobs[job_id] = answer = asyncio.get_running_loop().create_future()
        try:
            self._input.write(packed(make(job_id)))
            found = await answer
        finally:
            del self._jobs[job_id]
        if isinstance(found, Failed):
            raise error_from_json(found.error)
        if not isinstance(found, kind):
            raise NodeError(f"the fetching process answered {type(found).__name__} where {kind.__name__} was asked for")
        return found

    # ---- the child

    async def _launch(self) -> None:
        process = self._process = await _spawn()
        self._tail.clear()
        self._log = asyncio.create_task(self._read_log(_required(process.stderr)), name="fetch-log")
        writer = _required(process.stdin)
        writer.write(packed(self._config))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                event = await self._next(_required(process.stdout))
        except TimeoutError as error:
            raise ConfigError(f"the process that fetches adapters was not ready after {START_TIMEOUT_S:g} s") from error
        if isinstance(event, StartFailed):
            raise error_from_json(event.error)
        if not isinstance(event, Started):
            raise ConfigError(f"the process that fetches adapters did not start; its last lines:\n{await self._last_words()}")
        self._input = writer

    async def _supervise(self) -> None:
        """Hand out answers; replace the child when it is lost."""
        while True:
            await self._listen()
            self._input = None
            self._end_jobs()
            logger.error("the process that fetches adapters is lost; starting another: %s", await self._last_words())
            delay_s = RESTART_DELAY_S
            while self._input is None:
                await self._discard()
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
                try:
                    await self._launch()
                except NodeError as error:
                    logger.error("the process that fetches adapters did not start again: %s", error.message)

    async def _listen(self) -> None:
        """Until the child's output ends."""
        output = _required(_required(self._process).stdout)
        while (event := await self._next(output)) is not None:
            if isinstance(event, Started | StartFailed):
                continue
            answer = self._jobs.get(event.job_id)
            if answer is not None and not answer.done():
                answer.set_result(event)

    async def _next(self, output: asyncio.StreamReader) -> Event | None:
        """The child's next message; None where its output ended, or is no message."""
        try:
            length = int.from_bytes(await output.readexactly(LENGTH_BYTES), "little")
            return None if length > MAX_MESSAGE_BYTES else self._decoder.decode(await output.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            return None

    def _end_jobs(self) -> None:
        for job_id, answer in self._jobs.items():
            if not answer.done():
                error = _unavailable("the process that fetches adapters ended while it worked on this one")
                answer.set_result(Failed(job_id, error.to_json()))

    async def _discard(self) -> None:
        """Let the child end; insist where it does not."""
        process, self._process, self._input = self._process, None, None
        self._end_jobs()
        if process is None:
            return
        _required(process.stdin).close()
        for insist in (process.terminate, process.kill):
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    insist()
        await process.wait()
        await self._last_words()

    async def _last_words(self) -> str:
        """What the child wrote last, once it has written all."""
        if self._log is not None:
            await asyncio.wait({self._log}, timeout=STOP_TIMEOUT_S)
        return "\n".join(self._tail)

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line beyond the stream's limit; the reader has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._tail.append(text)
            logger.info("%s", text)


async def _spawn() -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # never import from the directory the node happens to be started in
            "-m",
            "node.adapters.fetching.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C goes to the parent alone, which then drains and stops this process
        )
    except OSError as error:
        raise ConfigError(
            f"the process that fetches adapters cannot be started (errno {error.errno}); check the limits"
        ) from error


_T = TypeVar("_T")


def _required(value: _T | None) -> _T:
    if value is None:
        raise NodeError("the fetching process was never started")
    return value


def _unavailable(message: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(f"{message}; try again in a few seconds", retry_after_s=RETRY_AFTER_S)


def _environment() -> dict[str, str]:
    """This environment, with the directory of this very `node` package first on the module path."""
    root = str(Path(node.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = f"{root}{os.pathsep}{inherited}" if inherited else root
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
