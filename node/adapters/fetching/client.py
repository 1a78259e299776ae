"""The API process's end of the fetching process: start it, ask it, start it again. Imports no source's library.

When the process is lost, every job under way ends with `source_unavailable` and another one is started; adapters that are known
are served meanwhile. A download that broke off goes on where it stopped when it is asked for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

import msgspec

from node.adapters.fetching.door import FetchedAdapter
from node.adapters.fetching.messages import (
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
from node.child_messages import next_message
from node.child_process import ChildProcess
from node.config import Settings
from node.errors import AdapterUnavailableError, ConfigError, NodeError, error_from_json
from node.request import LinearShape

START_TIMEOUT_S = 60.0
STOP_GRACE_S = 3.0
RESTART_DELAY_S = 0.5  # doubled after each start that fails
MAX_RESTART_DELAY_S = 30.0
MAX_JOBS = 4096
RETRY_AFTER_S = 5.0

_AnswerT = TypeVar("_AnswerT", bound=msgspec.Struct)
logger = logging.getLogger(__name__)


async def begin() -> ChildProcess:
    """Begin a fetching process, whose imports take a second; it opens nothing before it is told of what.

    Raises:
        ConfigError: The machine does not start it.
    """
    return await ChildProcess.start(
        "node.adapters.fetching.process", has_output=True, environment={"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    )


class FetchClient:
    """Talks to one fetching process. All methods are for one event loop.

    Args:
        settings: The node's settings; `adapters` and `data_dir` matter here.
        linears, base_id: The base model, from the engine's `Ready`.
        hub_endpoint: The hub's address; None: HF_ENDPOINT, else the public hub.
        started: A process begun earlier, see `begin`; None: `start` begins one.
    """

    def __init__(
        self,
        settings: Settings,
        linears: Sequence[LinearShape],
        base_id: str,
        *,
        hub_endpoint: str | None = None,
        started: ChildProcess | None = None,
    ) -> None:
        self._config = FetchConfig(
            adapters=settings.adapters.model_dump(mode="json"),
            data_dir=str(settings.data_dir),
            linears=tuple(linears),
            base_id=base_id,
            hub_endpoint=hub_endpoint,
        )
        self._started = started
        self._decoder = event_decoder()
        self._ids = count()
        self._jobs: dict[int, asyncio.Future[Answer]] = {}
        self._process: ChildProcess | None = None
        self._input: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None

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
            process = await self._launch()
        except NodeError:
            await self._discard()
            raise
        self._supervisor = asyncio.create_task(self._supervise(process), name="fetch-supervisor")

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

    async def _launch(self) -> ChildProcess:
        process, self._started = self._started or await begin(), None
        self._process = process
        process.input.write(packed(self._config))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                event = await self._next(process.output)
        except TimeoutError as error:
            raise ConfigError(f"the process that fetches adapters was not ready after {START_TIMEOUT_S:g} s") from error
        if isinstance(event, StartFailed):
            raise error_from_json(event.error)
        if not isinstance(event, Started):
            await self._discard()
            raise ConfigError(f"the process that fetches adapters did not start; its last lines:\n{process.log_tail}")
        self._input = process.input
        return process

    async def _supervise(self, process: ChildProcess) -> None:
        """Hand out answers; replace the child when it is lost."""
        while True:
            await self._listen(process.output)
            await self._discard()
            logger.error("the process that fetches adapters is lost; starting another: %s", process.log_tail)
            process = await self._restart()

    async def _restart(self) -> ChildProcess:
        delay_s = RESTART_DELAY_S
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
            try:
                return await self._launch()
            except NodeError as error:
                logger.error("the process that fetches adapters did not start again: %s", error.message)
                await self._discard()

    async def _listen(self, output: asyncio.StreamReader) -> None:
        """Until the child's output ends."""
        while (event := await self._next(output)) is not None:
            if isinstance(event, Started | StartFailed):
                continue
            answer = self._jobs.get(event.job_id)
            if answer is not None and not answer.done():
                answer.set_result(event)

    async def _next(self, output: asyncio.StreamReader) -> Event | None:
        """The child's next message; None where its output ended, or is no message."""
        content = await next_message(output, MAX_MESSAGE_BYTES)
        try:
            return None if content is None else self._decoder.decode(content)
        except msgspec.MsgspecError:
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
        if process is not None:
            await process.stop(grace_s=STOP_GRACE_S)


def _unavailable(message: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(f"{message}; try again in a few seconds", retry_after_s=RETRY_AFTER_S)
