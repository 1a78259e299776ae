"""Reading the ledger: receipts, records and earnings, as committed. Opens no lock and writes nothing.

The node reads through it on a connection of its own, off the event loop; the command line reads through it while a node runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, func, select
from sqlalchemy.exc import SQLAlchemyError

from attribution import receipt, record
from attribution.eip712 import digest
from attribution.errors import AttributionError
from attribution.receipt import Salts
from attribution.signing import recover
from node.errors import LedgerError
from node.settlement.ledger_database import explain, make_engine, parse_url
from node.settlement.tables import EARNINGS, RECORDS, USAGE

MAX_PAGE = 1000


class StoredRecord(msgspec.Struct, frozen=True):
    """A record as an auditor reads it: its JSON and its hash."""

    sequence: int
    record_hash: str
    record: dict[str, Any]


class EarningRow(msgspec.Struct, frozen=True):
    """What one account earned in one role (node, trainer, data, reserve) by one adapter; None is the node's own share.

    `recorded_wei` sums all usage, `payable_wei` only what payers signed for, which is what epochs pay.
    """

    account: str
    adapter_id: str | None
    role: str
    recorded_wei: int
    payable_wei: int
    request_count: int


class UsageRow(msgspec.Struct, frozen=True):
    """What one tenant, known by digest, was served on one UTC day: prompt and output tokens, and their price in wei."""

    tenant_digest: str
    day: str
    tokens: int
    wei: int


class LedgerTotals(msgspec.Struct, frozen=True):
    """The whole ledger in numbers. `by_status` counts records by ok, cancelled, failed and interrupted."""

    records: int
    by_status: dict[str, int]
    recorded_wei: int
    payable_wei: int


class LedgerReads:
    """Blocking reads; one connection, so one thread at a time.

    Args:
        url: The ledger's URL.

    Raises:
        LedgerError: The URL cannot be a ledger.
    """

    def __init__(self, url: str) -> None:
        self._url = parse_url(url)
        self._engine: Engine = make_engine(self._url, read_only=True)
        self._connection: Connection | None = None

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._engine.dispose()

    def receipt(self, request_id: str) -> dict[str, Any] | None:
        """The receipt bundle of a request, or None when it has no record (yet)."""
        rows = self.rows(select(RECORDS).where(RECORDS.c.request_id == request_id))
        return _bundle(rows[0]) if rows else None

    def records(self, after: int = 0, limit: int = 100) -> list[StoredRecord]:
        """Records with a sequence number above `after`, in order, at most `limit` (and 1,000)."""
        query = select(RECORDS.c.sequence, RECORDS.c.record_hash, RECORDS.c.body).where(RECORDS.c.sequence > after)
        rows = self.rows(query.order_by(RECORDS.c.sequence).limit(max(0, min(limit, MAX_PAGE))))
        return [StoredRecord(row.sequence, row.record_hash, json.loads(row.body)) for row in rows]

    def earnings(self, *, account: str | None = None, adapter_id: str | None = None) -> list[EarningRow]:
        """Earnings, of one account or of one adapter when given, largest first."""
        query = select(EARNINGS)
        if account is not None:
            query = query.where(func.lower(EARNINGS.c.account) == account.lower())
        if adapter_id is not None:
            query = query.where(EARNINGS.c.adapter_id == adapter_id)
        rows = self.rows(query.order_by(EARNINGS.c.recorded_wei.desc(), EARNINGS.c.account, EARNINGS.c.role))
        return [EarningRow(r.account, r.adapter_id or None, r.role, r.recorded_wei, r.payable_wei, r.request_count) for r in rows]

    def usage(self, month: str) -> list[UsageRow]:
        """What tenants were served in a month ("2026-01"), day by day."""
        rows = self.rows(select(USAGE).where(USAGE.c.day.startswith(month, autoescape=True)))
        return [UsageRow(row.tenant_digest, row.day, row.tokens, row.wei) for row in rows]

    def totals(self) -> LedgerTotals:
        """Counts and sums over all records. Amounts add up over the earnings, which is everything every fee was split into."""
        counted = self.rows(select(RECORDS.c.status, func.count().label("records")).group_by(RECORDS.c.status))
        by_status = {row.status: int(row.records) for row in counted}
        earnings = self.earnings()
        return LedgerTotals(
            sum(by_status.values()),
            by_status,
            sum(row.recorded_wei for row in earnings),
            sum(row.payable_wei for row in earnings),
        )

    def verify_chain(self) -> int:
        """Replay everything: hashes, chain, shares, fees, splits and signatures.

        Returns:
            How many records there are.

        Raises:
            LedgerError: ledger_corrupt, naming the first record that is wrong.
        """
        sequence, previous = 0, record.GENESIS_HASH
        for row in self._stored():
            try:
                parsed = record.parse(row.body)
                record.verify(parsed)
                signed = digest(
                    receipt.receipt_domain(row.chain_id), receipt.RECEIPT, receipt.message_of(parsed, row.record_hash)
                )
                signer = recover(signed, row.signature)
            except AttributionError as error:
                raise _corrupt(row.sequence, str(error)) from error
            if (parsed.sequence, parsed.previous_hash) != (sequence + 1, previous) or row.sequence != parsed.sequence:
                raise _corrupt(row.sequence, "it does not continue the chain")
            if record.hash_bytes(row.body) != row.record_hash or parsed.request_id != row.request_id:
                raise _corrupt(row.sequence, "its bytes are not what was hashed")
            if signer != row.signer:
                raise _corrupt(row.sequence, f"its receipt is not signed by {row.signer}")
            sequence, previous = parsed.sequence, row.record_hash
        return sequence

    def _stored(self) -> Iterator[Row[Any]]:
        after = 0
        while rows := self.rows(select(RECORDS).where(RECORDS.c.sequence > after).order_by(RECORDS.c.sequence).limit(MAX_PAGE)):
            yield from rows
            after = rows[-1].sequence

    def rows(self, query: Any) -> list[Row[Any]]:
        """Run one query in a transaction of its own, so that no snapshot outlives it."""
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            with self._connection.begin():
                return list(self._connection.execute(query))
        except SQLAlchemyError as error:
            if self._connection is not None:
                self._connection.invalidate()
                self._connection = None
            raise explain(error, self._url) from error


def _bundle(row: Row[Any]) -> dict[str, Any]:
    salts = Salts(row.prompt_salt, row.output_salt)
    return receipt.bundle(record.parse(row.body), row.record_hash, row.chain_id, row.signer, row.signature, salts)


def _corrupt(sequence: int, reason: str) -> LedgerError:
    return LedgerError(
        f"record {sequence} of the ledger is not what was signed: {reason}; restore a backup", code="ledger_corrupt"
    )
