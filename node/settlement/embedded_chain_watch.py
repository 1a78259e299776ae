"""Brings the embedded chain back when its process dies under a running node."""

from __future__ import annotations

import asyncio

from structlog.typing import FilteringBoundLogger

from node.errors import ChainError
from node.settlement.embedded_chain_process import EmbeddedChainProcess

MAX_PAUSE_S = 30.0


class EmbeddedChainWatch:
    """Restarts one chain process on its old port, so that nobody who speaks to it needs to know.

    Every block was on the disk before it was answered, so the chain comes back with all of them; what was being sent meanwhile is
    the outbox's to send again.

    Args:
        process: Started.
        logger: Told about every death and every start that failed.
        poll_s: Between two looks; doubled after every start that failed.
    """

    def __init__(self, process: EmbeddedChainProcess, logger: FilteringBoundLogger, poll_s: float = 1.0) -> None:
        self._process, self._logger, self._poll_s = process, logger, poll_s
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._run(), name="embedded-chain-watch")

    async def close(self) -> None:
        """Stop watching, then end the process; a start in progress is waited for."""
        self._stop.set()
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._process.close)

    async def _run(self) -> None:
        pause_s = self._poll_s
        while not await self._stopped_within(pause_s):
            if self._process.process_id is not None:
                pause_s = self._poll_s
                continue
            self._logger.error("embedded_chain_died")
            try:
                await asyncio.to_thread(self._restart)
            except ChainError as error:
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                self._logger.error("embedded_chain_not_restarted", code=error.error_code, reason=error.message, retry_s=pause_s)
            else:
                pause_s = self._poll_s
                self._logger.info("embedded_chain_restarted")

    def _restart(self) -> None:
        self._process.close()
        self._process.start()

    async def _stopped_within(self, pause_s: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), pause_s)
        except TimeoutError:
            return False
        return True
