"""Judging clients' grammars, each once: a worker process with limits, and a memory of its verdicts."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

import node
from node.api.grammar_worker import Verdict
from node.engine.grammar_cache import GrammarCache
from node.errors import GrammarError, OverloadedError

_START_TIMEOUT_S = 60.0
_QUEUE_LIMIT = 32
_TENANT_QUEUE_LIMIT = 4
_ANSWER_BYTES = 1 << 16
_TOO_COSTLY = Verdict("schema_too_complex", "compiling the grammar needs more time or memory than allowed; simplify it")


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost in the worker. `timeout_s`: wall time for one; `memory_bytes`: address space of the process."""

    timeout_s: float
    memory_bytes: int


class GrammarDesk:
    """Says whether a grammar can be used. For one event loop; the worker starts with the first grammar.

    Args:
        tokenizer: `tokenizer.json` of the model; vocab_size, end_ids: as the engine has them.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, end_ids: tuple[int, ...], limits: GrammarLimits) -> None:
        self._arguments = [
            str(tokenizer), str(vocab_size), ",".join(map(str, end_ids)), str(limits.memory_bytes)
        ]  # fmt: skip
        self._limits = limits
        self._verdicts: GrammarCache[Verdict] = GrammarCache()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting: dict[str, int] = {}

    async def check(self, tenant: str, text: str, param: str | None) -> None:
        """Judge a grammar, or remember the verdict.

        Raises:
            GrammarError: schema_invalid or schema_too_complex. OverloadedError: Too many grammars are being judged.
        """
        verdict = self._verdicts.get(tenant, text)
        if verdict is None:
            verdict = await self._queued(tenant, text)
            self._verdicts.put(tenant, text, verdict)
        if verdict.code is not None:
            raise GrammarError(f"`{param}`: {verdict.message}", code=verdict.code, param=param)

    async def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def _queued(self, tenant: str, text: str) -> Verdict:
        """Wait for the turn; one tenant may not fill the queue."""
        if sum(self._waiting.values()) >= _QUEUE_LIMIT or self._waiting.get(tenant, 0) >= _TENANT_QUEUE_LIMIT:
            raise OverloadedError("too many new grammars are being compiled now; retry in a second", retry_after_s=1.0)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        try:
            async with self._turn:
                return await self._judge(text)
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def _judge(self, text: str) -> Verdict:
        is_fresh = self._process is None or self._process.returncode is not None
        try:
            return await self._ask(text)
        except TimeoutError:
            return _TOO_COSTLY
        except ConnectionError:
            if is_fresh:
                return _TOO_COSTLY
        # A worker that has judged other grammars may have died of what they left behind: this one gets one of its own.
        try:
            return await self._ask(text)
        except (TimeoutError, ConnectionError):
            return _TOO_COSTLY

    async def _ask(self, text: str) -> Verdict:
        """The worker's answer; whoever leaves without one ends the worker, so that the next caller cannot read it.

        Raises:
            TimeoutError: Compiling takes too long. ConnectionError: The worker died of it.
        """
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await self._start()
        line = b""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                line = await _exchange(process, msgspec.json.encode(text) + b"\n")
        finally:
            if not line:
                await self.close()
        return msgspec.json.decode(line, type=Verdict)

    async def _start(self) -> asyncio.subprocess.Process:
        """Start a worker and wait until it is ready, which does not count as a grammar's time."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "node.api.grammar_worker",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(node.__file__).parents[1])},
            limit=_ANSWER_BYTES,
            start_new_session=True,
        )
        line = b""
        try:
            if process.stdout is not None:
                line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
        finally:
            if not line and process.returncode is None:
                process.kill()
                await process.wait()
        if not line:
            raise OverloadedError(
                "the grammar compiler did not start: this model's tokenizer may not be usable for it, or memory is short",
                code="queue_full",
                retry_after_s=5.0,
            )
        return process


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise ConnectionError("the worker has no pipes")
    process.stdin.write(line)
    await process.stdin.drain()
    answer = await process.stdout.readline()
    if not answer:
        raise ConnectionError("the worker died")
    return answer
