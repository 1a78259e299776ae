"""The API process's end of the ledger process: start it, hand it admissions and outcomes, start it again.

The first admission of a turn of the event loop goes down at once, because the engine waits for it. What else is told in that turn
goes in one message, as the answers of one commit come up in one. When the process is lost, calls under way end with
`ledger_unavailable`, nothing is admitted, and the next process closes those requests as failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from node.child_messages import next_message
from node.child_process import ChildProcess
from node.errors import LedgerError, NodeError, OverloadedError, error_from_json
from node.settlement.admission import Admission, Outcome
from node.settlement.ledger_messages import (
    MAX_MESSAGE_BYTES,
    AdmitCall,
    Call,
    CloseCall,
    Event,
    LedgerConfig,
    Opened,
    Refused,
    Settled,
    Work,
    packed,
)
from node.settlement.ledger_state import PayerState
from node.settlement.ledger_store import WriterOptions
from node.settlement.ledger_writer import SignedReceipt

START_TIMEOUT_S = 120.0  # a long ledger's migration included
STOP_TIMEOUT_S = 30.0
RESTART_DELAY_S = 0.2  # doubled after each start that fails
MAX_RESTART_DELAY_S = 10.0

logger = logging.getLogger(__name__)


async def begin() -> ChildProcess:
    """Begin a ledger process, whose imports take a second; it opens nothing before it is told what.

    Raises:
        ConfigError: The machine does not start it.
    """
    return await ChildProcess.start("node.settlement.ledger_process", has_output=True)


class LedgerClient:
    """Talks to one ledger process. All methods are for one event loop.

    Args:
        url: The ledger's. keys_dir: Where the process finds the operator's key.
        operator: Address that key must have.
        chain_id: What receipts are signed for.
        started: A process begun earlier, see `begin`; None: `start` begins one.
    """

    def __init__(
        self,
        url: str,
        options: WriterOptions,
        *,
        keys_dir: Path,
        operator: str,
        chain_id: int,
        started: ChildProcess | None = None,
    ) -> None:
        self._url, self._options, self._keys_dir, self._chain_id = url, options, keys_dir, chain_id
        self._operator = operator
        self._started = started
        self._decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
        self._ids = count()
        self._calls: dict[int, tuple[str, asyncio.Future[Any]]] = {}  # request id and who waits
        self._unsent: list[Call] = []  # of this turn of the event loop
        self._is_telling = False  # whether `_send` comes with the next turn
        self._lost: set[str] = set()
        self._process: ChildProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_closing = False
        self.is_healthy = False
        self.payers: dict[str, PayerState] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the child, for the doctor and for tests."""
        return None if self._process is None else self._process.pid

    # ---- life

    async def start(self) -> Opened:
        """Start the process and wait until its ledger is open.

        Raises:
            NodeError: What the ledger says of itself, or ConfigError where the process cannot be started.
        """
        try:
            opened = await self._launch(is_first=True)
        except NodeError:
            await self._discard()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="ledger-supervisor")
        return opened

    async def close(self) -> None:
        """Let the process commit what it was told, and end it."""
        self._send()
        self._is_closing = True
        if self._process is not None:
            self._process.input.close()
        if self._supervisor is not None:
            done, _ = await asyncio.wait({self._supervisor}, timeout=STOP_TIMEOUT_S)
            if not done:
                self._supervisor.cancel()
                await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._discard()

    # ---- calls

    async def admit(self, admission: Admission, admitted_ms: int) -> None:
        """See `Ledger.admit`."""
        call_id, answer = self._begin(admission.request_id)
        self._tell(AdmitCall(call_id, admission, admitted_ms), at_once=True)
        await answer

    async def close_request(self, outcome: Outcome) -> SignedReceipt:
        """See `Ledger.close`."""
        call_id, answer = self._begin(outcome.request_id)
        self._tell(CloseCall(call_id, outcome), at_once=False)
        signed: SignedReceipt = await answer
        return signed

    def _begin(self, request_id: str) -> tuple[int, asyncio.Future[Any]]:
        """The id of a new call, and its answer."""
        if self._process is None or self._is_closing:
            self._lost.add(request_id)
            raise _unavailable("the ledger process is down and being started")
        if len(self._calls) >= self._options.queue_limit:
            raise OverloadedError(
                f"{self._options.queue_limit} pieces of ledger work wait already; try again later", retry_after_s=1.0
            )
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call_id = next(self._ids)
        self._calls[call_id] = (request_id, answer)
        return call_id, answer

    def _tell(self, call: Call, *, at_once: bool) -> None:
        """`at_once`: not with the rest of this turn, where it is the turn's first."""
        is_first, self._is_telling = not self._is_telling, True
        if is_first:
            asyncio.get_running_loop().call_soon(self._send)
        if is_first and at_once:
            self._write([call])
        else:
            self._unsent.append(call)

    def _send(self) -> None:
        self._is_telling = False
        calls, self._unsent = self._unsent, []
        if calls:
            self._write(calls)

    def _write(self, calls: Sequence[Call]) -> None:
        if self._process is not None and not self._process.input.is_closing():
            self._process.input.write(packed(Work(list(calls))))

    # ---- the child

    async def _launch(self, *, is_first: bool) -> Opened:
        process, self._started = self._started or await begin(), None
        self._process = process
        # Who ends while a process is begun is lost, too; who ends after this line tells the process itself.
        lost = None if is_first else sorted(self._lost)
        config = LedgerConfig(
            url=self._url,
            keys_dir=str(self._keys_dir),
            chain_id=self._chain_id,
            options=self._options,
            lost=lost,
        )
        process.input.write(packed(config))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                event = await self._next(process)
        except TimeoutError as error:
            raise LedgerError(f"the ledger process was not ready after {START_TIMEOUT_S:g} s") from error
        if isinstance(event, Refused):
            raise error_from_json(event.error)
        if not isinstance(event, Opened):
            await process.stop()
            raise LedgerError(f"the ledger process did not start; its last lines:\n{process.log_tail}")
        if event.operator != self._operator:
            raise LedgerError(f"the ledger process signs for {event.operator} and the node for {self._operator}; start it again")
        self.payers, self.is_healthy = event.payers, True
        self._lost.difference_update(lost or ())
        return event

    async def _supervise(self) -> None:
        """Hand out answers; replace the child when it is lost."""
        while self._process is not None:
            await self._listen(self._process)
            if self._is_closing:
                return
            tail = self._process.log_tail
            await self._discard()
            logger.error("the ledger process is lost; starting another: %s", tail)
            await self._restart()
            if self._is_closing and self._process is not None:
                self._process.input.close()  # `close` came while there was none

    async def _restart(self) -> None:
        delay_s = RESTART_DELAY_S
        while self._process is None and not self._is_closing:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
            try:
                await self._launch(is_first=False)
            except NodeError as error:
                logger.error("the ledger process did not start again: %s", error.message)
                await self._discard()

    async def _listen(self, process: ChildProcess) -> None:
        """Until the child's output ends."""
        while (event := await self._next(process)) is not None:
            if isinstance(event, Settled):
                self._settle(event)

    def _settle(self, event: Settled) -> None:
        self.is_healthy = event.is_healthy
        self.payers.update(event.payers)
        if event.is_healthy:
            self._lost.clear()  # a process that commits has closed whom it could not answer before
        for answer in event.answers:
            request_id, waiting = self._calls.pop(answer.call_id, ("", None))
            if answer.error is not None and not event.is_healthy:
                self._lost.add(request_id)  # the process knows it, too, but may be lost before it commits again
            if waiting is None or waiting.done():
                continue  # answered before, by a writer that failed half-way; or nobody waits any more
            if answer.error is None:
                waiting.set_result(answer.receipt)
            else:
                waiting.set_exception(error_from_json(answer.error))

    async def _next(self, process: ChildProcess) -> Event | None:
        """The child's next message; None where its output ended, or is no message."""
        content = await next_message(process.output, MAX_MESSAGE_BYTES)
        try:
            return None if content is None else self._decoder.decode(content)
        except msgspec.MsgspecError:
            return None

    async def _discard(self) -> None:
        """Let the child end, and tell who waits for it."""
        process, self._process = self._process, None
        self.is_healthy = False
        calls, self._calls, self._unsent = self._calls, {}, []
        for request_id, waiting in calls.values():
            self._lost.add(request_id)
            if not waiting.done():
                waiting.set_exception(_unavailable("the ledger process ended before it answered"))
        if process is not None:
            await process.stop()


def _unavailable(message: str) -> LedgerError:
    return LedgerError(f"{message}; the node serves again once its ledger commits", retry_after_s=5.0)
