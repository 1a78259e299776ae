"""The ledger: every admitted request gets exactly one record, committed before its answer ends.

`admit` returns when "this request exists" is on the disk, `close` when its record is. Both run on the event loop and hand the
work to one writer: in a node a process of its own, else a thread. Reads and other transactions run on threads and connections of
their own. Nothing here knows of tensors or HTTP.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from attribution.digests import tenant_digest
from attribution.signing import Signer
from node.child_process import ChildProcess
from node.errors import LedgerError
from node.settlement.admission import Admission, Outcome, SignedVoucher, open_request
from node.settlement.ledger_client import LedgerClient
from node.settlement.ledger_database import explain, make_engine, parse_url
from node.settlement.ledger_reads import EarningRow, LedgerReads, LedgerTotals, StoredRecord, UsageRow
from node.settlement.ledger_state import PayerState
from node.settlement.ledger_store import LedgerStore, WriterOptions
from node.settlement.ledger_writer import Admit, Close, LedgerWriter, SignedReceipt, Transact

_Result = TypeVar("_Result")


class Ledger:
    """One node's ledger. `await open()` before, `await shutdown()` after.

    Args:
        url: sqlite:///PATH or postgresql+psycopg://...
        clock_ms: UTC milliseconds.
        signer: The operator's receipt key; its address is the operator of every record.
        chain_id: What receipts are signed for.
        group_commit_ms: Between the beginnings of two commits; what comes meanwhile shares the second.
        queue_limit: Pieces of work that may wait for the writer.
        busy_timeout_ms: How long a commit waits for another process on the same SQLite file.
        retry_s: Pause between attempts while the database does not commit.
        random_bytes: Source of salts.
        keys_dir: Where a process of its own, which then writes, finds the operator's key; None: a thread of this process writes.
            That process has a clock and salts of its own.
        process: That process, where it was begun already.
    """

    def __init__(
        self,
        url: str,
        *,
        clock_ms: Callable[[], int],
        signer: Signer,
        chain_id: int,
        group_commit_ms: float = 2.0,
        queue_limit: int = 8192,
        busy_timeout_ms: int = 5000,
        retry_s: float = 1.0,
        random_bytes: Callable[[int], bytes] = os.urandom,
        keys_dir: Path | None = None,
        process: ChildProcess | None = None,
    ) -> None:
        self.url = url
        self._clock_ms, self._signer, self._random_bytes = clock_ms, signer, random_bytes
        self._parsed = parse_url(url)
        self._chain_id = chain_id
        self._options = WriterOptions(group_commit_ms, queue_limit, busy_timeout_ms, retry_s)
        self._client: LedgerClient | None = None
        if keys_dir is not None:
            self._client = LedgerClient(
                url, self._options, keys_dir=keys_dir, operator=signer.address, chain_id=chain_id, started=process
            )
        self._reader_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-reader")
        self._transactor_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-transactor")
        self._store: LedgerStore | None = None
        self._engine: Engine | None = None
        self._reads: LedgerReads | None = None
        self._tenant_salt = b""

    @property
    def operator(self) -> str:
        """Address of the receipt key."""
        return self._signer.address

    @property
    def is_healthy(self) -> bool:
        """Whether the last commit succeeded. While False nothing is admitted and readiness says 503."""
        if self._client is not None:
            return self._client.is_healthy
        return self._store is not None and self._store.writer.is_healthy

    @property
    def engine(self) -> Engine:
        """The write engine, for the outbox's own short transactions in the same database. Open only."""
        if self._engine is None:
            raise LedgerError("the ledger is not open; start the node again")
        return self._engine

    async def open(self) -> int:
        """Lock, migrate and load the ledger, and close what a crash left open.

        Returns:
            How many requests were interrupted by the crash.

        Raises:
            LedgerError: ledger_locked, ledger_schema_newer, ledger_corrupt, or ledger_unavailable with the reason.
        """
        if self._client is None:
            return await asyncio.to_thread(self._open)
        opened = await self._client.start()
        self._tenant_salt = opened.tenant_salt
        self._engine = make_engine(self._parsed, busy_timeout_ms=self._options.busy_timeout_ms)
        self._reads = LedgerReads(self.url)
        return opened.interrupted

    async def shutdown(self) -> None:
        """Commit what waits, then let go of files, threads, the lock and the process."""
        if self._client is not None:
            await self._client.close()
        await asyncio.to_thread(self._shutdown)

    async def admit(self, admission: Admission) -> None:
        """Make a request durable before the engine sees it.

        Raises:
            RequestError: Its recipe cannot be recorded. OverloadedError: Too much work waits.
            LedgerError: ledger_unavailable; the request must not be served.
        """
        if not self.is_healthy:
            raise LedgerError("the ledger does not commit; nothing is admitted until it does", retry_after_s=5.0)
        if self._client is not None:
            await self._client.admit(admission, self._clock_ms())
            return
        request = open_request(
            admission,
            operator=self.operator,
            admitted_ms=self._clock_ms(),
            tenant_salt=self._tenant_salt,
            random_bytes=self._random_bytes,
        )
        await self._submit(lambda done: Admit(request, done))

    async def close(self, outcome: Outcome) -> SignedReceipt:
        """Make the record of a request durable and return its signed receipt. The answer's last event waits for this.

        Cancelling the caller does not cancel the record.

        Raises:
            LedgerError: ledger_unavailable; the answer must end with that error instead of a receipt.
        """
        if self._client is not None:
            return await self._client.close_request(outcome)
        signed: SignedReceipt = await self._submit(lambda done: Close(outcome, done))
        return signed

    async def transact(self, work: Callable[[Connection], _Result]) -> _Result:
        """Run `work` in one write transaction on a thread; it commits when `work` returns.

        Raises:
            NodeError: What `work` raised. LedgerError: The transaction did not commit.
        """
        if self._client is not None:
            return await asyncio.get_running_loop().run_in_executor(self._transactor_thread, self._transacted, work)
        result: _Result = await self._submit(lambda done: Transact(work, done))
        return result

    def used_wei(self, payer: str) -> int:
        """What a payer's records cost so far, of usage it signed for."""
        known = self._payers.get(payer)
        return 0 if known is None else known.used_wei

    def best_voucher(self, payer: str) -> SignedVoucher | None:
        """The best voucher that a payer signed for an admitted request: what its usage can be collected with."""
        known = self._payers.get(payer)
        return None if known is None else known.voucher

    async def receipt(self, request_id: str, tenant: str | None = None) -> dict[str, Any] | None:
        """The receipt bundle of a request, or None when it has no record (yet), or not one of `tenant` where that is given."""
        bundle = await self.read(lambda reads: reads.receipt(request_id))
        if bundle is None or tenant is None:
            return bundle
        is_theirs = bundle["record"]["tenant_digest"] == self.tenant_digest(tenant)
        return bundle if is_theirs else None

    async def records(self, after: int = 0, limit: int = 100) -> list[StoredRecord]:
        """Records above a sequence number, in order, at most 1,000 a call."""
        return await self.read(lambda reads: reads.records(after, limit))

    async def earnings(self, *, account: str | None = None, adapter_id: str | None = None) -> list[EarningRow]:
        """Earnings of one account, of one adapter, or all; largest first."""
        return await self.read(lambda reads: reads.earnings(account=account, adapter_id=adapter_id))

    async def usage(self, month: str) -> list[UsageRow]:
        """What tenants, by digest, were served in a month ("2026-01"), day by day."""
        return await self.read(lambda reads: reads.usage(month))

    def tenant_digest(self, tenant: str) -> str:
        """The tenant as records name it."""
        return tenant_digest(tenant, self._tenant_salt)

    async def totals(self) -> LedgerTotals:
        """Counts and sums over all records."""
        return await self.read(lambda reads: reads.totals())

    async def verify_chain(self) -> int:
        """Replay all records; how many there are. Raises LedgerError (ledger_corrupt) at the first wrong one."""
        return await self.read(lambda reads: reads.verify_chain())

    async def read(self, query: Callable[[LedgerReads], _Result]) -> _Result:
        """Run a query on the reading thread."""
        reads = self._reads
        if reads is None:
            raise LedgerError("the ledger is closed; start the node again")
        return await asyncio.get_running_loop().run_in_executor(self._reader_thread, query, reads)

    def _open(self) -> int:
        store = LedgerStore.open(self.url, self._options, signer=self._signer, chain_id=self._chain_id, clock_ms=self._clock_ms)
        self._store, self._engine, self._tenant_salt = store, store.engine, store.tenant_salt
        self._reads = LedgerReads(self.url)
        return store.interrupted

    def _shutdown(self) -> None:
        if self._store is not None:
            self._store.close()
        self._reader_thread.shutdown(wait=True)
        self._transactor_thread.shutdown(wait=True)
        if self._reads is not None:
            self._reads.close()
            self._reads = None
        if self._engine is not None:
            self._engine.dispose()

    @property
    def _payers(self) -> Mapping[str, PayerState]:
        """As committed. Payers are replaced, never changed."""
        return self._client.payers if self._client is not None else self._opened_writer().payers

    def _transacted(self, work: Callable[[Connection], _Result]) -> _Result:
        if not self.is_healthy:
            raise LedgerError("the ledger does not commit; nothing is changed until it does", retry_after_s=5.0)
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except (SQLAlchemyError, OSError) as error:
            raise explain(error, self._parsed) from error

    def _opened_writer(self) -> LedgerWriter:
        if self._store is None:
            raise LedgerError("the ledger is not open; start the node again")
        return self._store.writer

    async def _submit(self, make: Callable[[Callable[[Any, BaseException | None], None]], Admit | Close | Transact]) -> Any:
        """Put work on the writer's queue and wait for its commit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def done(result: Any, error: BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        self._opened_writer().put(make(done))
        return await future
