"""The one thread that writes the ledger. Whatever waits when a commit begins shares it.

Order in the hash chain is decided here and nowhere else. A commit that fails fails everything in its group; the writer then
reloads what the database really holds and keeps trying, closing the requests whose answers were lost as failed, until one
commit succeeds.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, bindparam, select, update
from sqlalchemy.exc import SQLAlchemyError

from attribution import receipt, record
from attribution.eip712 import Domain
from attribution.errors import AttributionError
from attribution.receipt import Salts
from attribution.signing import Signer
from node.errors import LedgerError, NodeError, OverloadedError
from node.settlement.admission import OpenRequest, Outcome
from node.settlement.ledger_queue import WorkQueue
from node.settlement.ledger_state import Group, LedgerState, PayerState
from node.settlement.tables import META, RECORDS

MAX_GROUP = 256
LEAST_GROUP = 8  # a commit takes SQLAlchemy and SQLite as long as two records, however fast the disk is
HEALED_KEY = "healed_ms"
_RECORDED = select(RECORDS.c.request_id).where(RECORDS.c.request_id.in_(bindparam("asked", expanding=True)))
_LOG = logging.getLogger(__name__)

Done = Callable[[Any, BaseException | None], None]


class SignedReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """A committed record with the operator's signature. `encoded` is the JSON that verifies offline: nobody between the writer
    and the client reads it."""

    request_id: str
    sequence: int
    record_hash: str
    fee_wei: int
    payer: str | None
    encoded: msgspec.Raw

    @property
    def bundle(self) -> dict[str, Any]:
        """`encoded`, read."""
        value: dict[str, Any] = msgspec.json.decode(self.encoded)
        return value


@dataclass(frozen=True, slots=True)
class Admit:
    """Make "this request was admitted" durable."""

    request: OpenRequest
    done: Done


@dataclass(frozen=True, slots=True)
class Close:
    """Make the record of a request durable; the result is its SignedReceipt."""

    outcome: Outcome
    done: Done


@dataclass(frozen=True, slots=True)
class Transact:
    """Run other work (an epoch, an intent's end) in a transaction of its own; the result is what it returns."""

    work: Callable[[Connection], Any]
    done: Done


class LedgerWriter:
    """Owns the write connection and the state. `start`, then `put`; `stop` drains what was put before it.

    Args:
        engine: Write engine.
        clock_ms: UTC milliseconds.
        signer: The operator's receipt key.
        domain: EIP-712 domain of receipts.
        group_commit_ms: Between the beginnings of two commits; what comes meanwhile shares the second.
        retry_s: Pause between attempts while the database does not commit.
        queue_limit: Pieces of work that may wait.
        explain: Turns a database's error into a LedgerError.
        settled: Called by the writer's thread after each group, however it ended; its callers have been told then.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock_ms: Callable[[], int],
        signer: Signer,
        domain: Domain,
        group_commit_ms: float,
        retry_s: float,
        queue_limit: int,
        explain: Callable[[BaseException], LedgerError],
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._clock_ms, self._signer, self._domain = engine, clock_ms, signer, domain
        self._group_s, self._retry_s, self._explain = group_commit_ms / 1000, retry_s, explain
        self._settled = settled
        self._queue: WorkQueue[Admit | Close | Transact] = WorkQueue(queue_limit)
        self._begun_s = -math.inf  # when the last group of work began
        self._least = LEAST_GROUP  # pieces of work that are worth a commit of their own
        self._connection: Connection | None = None
        self._state = LedgerState()
        self._lost: set[str] = set()  # open requests whose answers ended without a receipt
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self.is_healthy = True

    def load(self, lost: Collection[str] | None = None) -> int:
        """Read the state and close what a crash left open as interrupted, fee 0. Called before `start`.

        Args:
            lost: Where only this process was lost and the node goes on: the requests whose answers ended without a receipt. They
                alone are closed, as failed.

        Returns:
            How many requests were closed.
        """
        with self._begin() as connection:
            self._state = LedgerState.load(connection)
            status, reason = ("interrupted", "interrupted") if lost is None else ("failed", "ledger_unavailable")
            ended = [request for key, request in self._state.open_requests.items() if lost is None or key in lost]
            group = Group(self._state)
            for request in ended:
                self._append(group, request, Outcome(request_id=request.request_id, status=status, finish_reason=reason))
            group.write(connection)
        group.merge()
        return len(ended)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, then end. Blocks."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()
        self._disconnect()

    def put(self, *items: Admit | Close | Transact) -> None:
        """Hand over work without blocking, all of it or none.

        Raises:
            OverloadedError: Too much work waits. LedgerError: The writer does not run.
        """
        if not self._thread.is_alive():
            raise LedgerError("the ledger is closed; start the node again")
        if not self._queue.put(items):
            if self._queue.is_closed:
                raise LedgerError("the ledger is closed; start the node again")
            raise OverloadedError(f"{self._queue.limit} pieces of ledger work wait already; try again later", retry_after_s=1.0)

    @property
    def payers(self) -> dict[str, PayerState]:
        """What is committed of every payer, safe from any thread: payers are replaced, never changed. Another dictionary after a
        failure, for the writer has read the ledger again."""
        return self._state.payers

    def _run(self) -> None:
        is_last = False
        while not is_last:
            items = self._gather()
            is_last = self._queue.is_ended
            try:
                self._serve(items)
            except BaseException:
                # A defect must not leave callers waiting for ever, nor those left behind for the next group: answer what waits,
                # then let the thread die loudly.
                self.is_healthy = False
                self._queue.close()
                self._refuse(items + self._queue.take(self._queue.limit))
                raise
            finally:
                self._settled()

    def _serve(self, items: list[Admit | Close | Transact]) -> None:
        if not self.is_healthy:
            self._heal()
        if not self.is_healthy:
            self._refuse(items)
            return
        grouped = [item for item in items if not isinstance(item, Transact)]
        if grouped:
            self._commit_group(grouped)
        for item in items:
            if isinstance(item, Transact):
                self._commit_transaction(item)

    def _refuse(self, items: list[Admit | Close | Transact]) -> None:
        """Answer without trying: the database does not commit. Lost closes are recorded as failed later."""
        self._remember_lost(items)
        for item in items:
            item.done(None, LedgerError("the ledger does not commit; nothing is admitted until it does", retry_after_s=5.0))

    def _gather(self) -> list[Admit | Close | Transact]:
        """Wait for work; behind a commit that has only just begun, a little longer for more. While unhealthy, come back
        empty-handed after a pause.

        Half of what waits is a group, so that answers leave while the rest is worked on: 32 that ended together are 16, 8 and 8.
        """
        self._queue.wait(1, None if self.is_healthy else self._retry_s)
        pause_s = self._begun_s + self._group_s - time.monotonic()
        if pause_s > 0:
            self._queue.wait(MAX_GROUP, pause_s)
        waiting = self._queue.waiting
        count = min(MAX_GROUP, max(self._least, -(-waiting // 2)))
        # Who is left behind on purpose waits for nobody else.
        self._begun_s = time.monotonic() if waiting <= count else -math.inf
        return self._queue.take(count)

    def _commit_group(self, items: list[Admit | Close]) -> None:
        group, results = Group(self._state), []
        begun_s = time.perf_counter()
        try:
            with self._begin() as connection:
                known = self._known(connection, items)
                for item in items:
                    results.append(self._apply(group, item, known))
                group.write(connection)
                written_s = time.perf_counter()
        except (SQLAlchemyError, OSError) as error:
            self._fail(items, error)
            return
        group.merge()
        self._least = least_group(len(items), written_s - begun_s, time.perf_counter() - written_s)
        for item, (result, problem) in zip(items, results, strict=True):
            item.done(result, problem)

    def _apply(self, group: Group, item: Admit | Close, known: set[str]) -> tuple[Any, NodeError | None]:
        """One piece of work inside the group: its result, or why it alone is refused."""
        if isinstance(item, Admit):
            request_id = item.request.request_id
            if request_id in known or group.open_request(request_id) is not None:
                return None, LedgerError(f"request {request_id} was admitted before; every request has an id of its own")
            group.admit(item.request)
            return None, None
        request = group.open_request(item.outcome.request_id)
        if request is None:
            return None, LedgerError(f"request {item.outcome.request_id} is not open: never admitted, or closed before")
        try:
            return self._append(group, request, item.outcome), None
        except AttributionError as error:
            return None, LedgerError(f"request {request.request_id} has no valid record: {error}")

    def _append(self, group: Group, request: OpenRequest, outcome: Outcome) -> SignedReceipt:
        """Build, hash and sign the next record."""
        facts = request.facts(outcome, self._clock_ms())
        built = record.build(facts, sequence=group.sequence + 1, previous_hash=group.record_hash)
        body = built.to_bytes()
        record_hash = record.hash_bytes(body)
        signature = receipt.sign(built, record_hash, self._domain, self._signer)
        row: dict[str, object] = {
            "sequence": built.sequence,
            "request_id": request.request_id,
            "record_hash": record_hash,
            "status": built.status,
            "payer": built.payer,
            "fee_wei": int(built.fee_wei),
            "finished_ms": built.finished_ms,
            "chain_id": self._domain.chain_id,
            "signer": self._signer.address,
            "signature": signature,
            "prompt_salt": request.prompt_salt,
            "output_salt": request.output_salt,
            "body": body,
        }
        group.add(request, built, record_hash, row)
        salts = Salts(request.prompt_salt, request.output_salt)
        domain, signer = self._domain, self._signer.address
        encoded = receipt.encoded_bundle(built, body, record_hash, domain.chain_id, signer, signature, salts)
        return SignedReceipt(
            request_id=request.request_id,
            sequence=built.sequence,
            record_hash=record_hash,
            fee_wei=int(built.fee_wei),
            payer=built.payer,
            encoded=msgspec.Raw(encoded),
        )

    def _known(self, connection: Connection, items: list[Admit | Close]) -> set[str]:
        """Which of the ids to admit have a record already."""
        asked = [item.request.request_id for item in items if isinstance(item, Admit)]
        if not asked:
            return set()
        return set(connection.execute(_RECORDED, {"asked": asked}).scalars())

    def _commit_transaction(self, item: Transact) -> None:
        try:
            with self._begin() as connection:
                result = item.work(connection)
        except NodeError as error:
            item.done(None, error)
        except (SQLAlchemyError, OSError) as error:
            self._fail([item], error)
        else:
            item.done(result, None)

    def _fail(self, items: Sequence[Admit | Close | Transact], error: BaseException) -> None:
        """Nothing of the group is durable as far as anyone may know."""
        explained = self._explain(error)
        _LOG.error("ledger commit failed: %s", explained.message)
        self.is_healthy = False
        self._remember_lost(items)
        self._disconnect()
        for item in items:
            item.done(None, explained)

    def _remember_lost(self, items: Sequence[Admit | Close | Transact]) -> None:
        """Admissions, too: a commit whose failure was reported may have reached the disk all the same."""
        for item in items:
            if isinstance(item, Close):
                self._lost.add(item.outcome.request_id)
            elif isinstance(item, Admit) and item.request.request_id not in self._state.open_requests:
                self._lost.add(item.request.request_id)

    def _heal(self) -> None:
        """Reload what really committed, then commit the lost requests as failed. Succeeds or leaves everything as it was."""
        try:
            with self._begin() as connection:
                state = LedgerState.load(connection)
                group = Group(state)
                lost = [request for request_id, request in state.open_requests.items() if request_id in self._lost]
                for request in lost:
                    outcome = Outcome(request_id=request.request_id, status="failed", finish_reason="ledger_unavailable")
                    self._append(group, request, outcome)
                group.write(connection)
                values = {"value": str(self._clock_ms())}
                connection.execute(update(META).where(META.c.key == HEALED_KEY).values(**values))
        except (SQLAlchemyError, OSError):
            self._disconnect()
            return
        group.merge()
        self._state, self._lost = state, set()
        self.is_healthy = True
        _LOG.info("ledger commits again; %d requests closed as failed", len(lost))

    def _begin(self) -> Any:
        """A transaction on the writer's own connection."""
        if self._connection is None:
            self._connection = self._engine.connect()
        return _Transaction(self._connection)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def least_group(count: int, work_s: float, commit_s: float) -> int:
    """From how many pieces of work on a commit takes no longer than the work, after one of `count` pieces."""
    return max(LEAST_GROUP, min(MAX_GROUP, math.ceil(commit_s * count / max(work_s, 1e-9))))


class _Transaction:
    """`with` around one transaction that hands out the connection, not the transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Connection:
        self._transaction = self._connection.begin()
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._transaction.commit()
        else:
            self._transaction.rollback()
