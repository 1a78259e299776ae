"""The ledger's tables. Amounts are fixed-width decimal text: exact, and in the same order as the numbers they spell.

A 64-bit integer column would overflow at 9.2 tokens of 18 decimals. Every statement is SQLAlchemy Core on these tables, so that
SQLite and PostgreSQL run the same code; `migrations/` makes the tables, these classes describe them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Dialect, LargeBinary, String, Text, TypeDecorator
from sqlmodel import Field, SQLModel

WEI_DIGITS = 78  # 2**256 has 78


class Wei(TypeDecorator[int]):
    """An integer of 0..2**256 - 1 as 78 decimal digits."""

    impl = String(WEI_DIGITS)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        """Integer to text."""
        return None if value is None else f"{value:0{WEI_DIGITS}d}"

    def process_result_value(self, value: Any | None, dialect: Dialect) -> int | None:
        """Text to integer."""
        return None if value is None else int(value)


class LedgerMeta(SQLModel, table=True):
    """Single values: `tenant_salt` (hex), `healed_ms`."""

    __tablename__ = "ledger_meta"

    key: str = Field(primary_key=True, max_length=64)
    value: str = Field(sa_type=Text)


class LedgerRequest(SQLModel, table=True):
    """A request that was admitted and has no record yet. `body` is an OpenRequest as JSON."""

    __tablename__ = "ledger_request"

    request_id: str = Field(primary_key=True, max_length=128)
    body: bytes = Field(sa_type=LargeBinary)


class LedgerRecord(SQLModel, table=True):
    """One record of the chain, as the canonical bytes that were hashed, with its receipt's signature and salts."""

    __tablename__ = "ledger_record"

    sequence: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    request_id: str = Field(unique=True, max_length=128)
    record_hash: str = Field(unique=True, max_length=64)
    status: str = Field(max_length=16)
    payer: str | None = Field(default=None, index=True, max_length=42)
    fee_wei: int = Field(sa_type=Wei)
    finished_ms: int = Field(sa_type=BigInteger)
    chain_id: int = Field(sa_type=BigInteger)
    signer: str = Field(max_length=42)
    signature: bytes = Field(sa_type=LargeBinary)
    prompt_salt: bytes = Field(sa_type=LargeBinary)
    output_salt: bytes = Field(sa_type=LargeBinary)
    body: bytes = Field(sa_type=LargeBinary)


class LedgerPayer(SQLModel, table=True):
    """What one payer has used so far, and the best voucher it signed."""

    __tablename__ = "ledger_payer"

    payer: str = Field(primary_key=True, max_length=42)
    used_wei: int = Field(sa_type=Wei)
    operator: str = Field(max_length=42)
    cumulative_wei: int = Field(sa_type=Wei)
    deadline: int = Field(sa_type=Wei)  # uint64 does not fit a signed 64-bit column
    signature: bytes = Field(sa_type=LargeBinary)


class LedgerUsage(SQLModel, table=True):
    """What one tenant was served on one UTC day: budgets are held against it, also after a restart."""

    __tablename__ = "ledger_usage"

    tenant_digest: str = Field(primary_key=True, max_length=64)
    day: str = Field(primary_key=True, index=True, max_length=10)  # 2026-01-31
    tokens: int = Field(sa_type=BigInteger)
    wei: int = Field(sa_type=Wei)


class LedgerEarning(SQLModel, table=True):
    """What one account earned in one role by one adapter (empty for the node's own share), summed over the records."""

    __tablename__ = "ledger_earning"

    account: str = Field(primary_key=True, max_length=42)
    adapter_id: str = Field(primary_key=True, max_length=64)
    role: str = Field(primary_key=True, max_length=16)
    recorded_wei: int = Field(sa_type=Wei)  # by all usage
    payable_wei: int = Field(sa_type=Wei)  # by usage a payer signed for
    request_count: int = Field(sa_type=BigInteger)


class Epoch(SQLModel, table=True):
    """One closed epoch. `serial` counts attempts, `epoch_id` is its place in the contract's queue."""

    __tablename__ = "epoch"

    serial: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    epoch_id: int = Field(sa_type=BigInteger)
    intent_key: str = Field(unique=True, max_length=200)
    chain_id: int = Field(sa_type=BigInteger)
    rewards: str = Field(max_length=42)
    operator: str = Field(max_length=42)
    root: str = Field(max_length=64)
    receipts_root: str = Field(max_length=64)
    leaves_hash: str = Field(max_length=64)
    total_wei: int = Field(sa_type=Wei)
    record_count: int = Field(sa_type=BigInteger)
    closed_ms: int = Field(sa_type=BigInteger)


class EpochEntry(SQLModel, table=True):
    """Cumulative total of one account in one epoch's tree."""

    __tablename__ = "epoch_entry"

    serial: int = Field(primary_key=True, sa_type=BigInteger, foreign_key="epoch.serial")
    account: str = Field(primary_key=True, max_length=42)
    cumulative_wei: int = Field(sa_type=Wei)


class EpochPayer(SQLModel, table=True):
    """How much of one payer's usage an epoch covers, and up to which record."""

    __tablename__ = "epoch_payer"

    serial: int = Field(primary_key=True, sa_type=BigInteger, foreign_key="epoch.serial")
    payer: str = Field(primary_key=True, max_length=42)
    used_wei: int = Field(sa_type=Wei)
    last_sequence: int = Field(sa_type=BigInteger)


_TABLES = SQLModel.metadata.tables
META = _TABLES["ledger_meta"]
REQUESTS = _TABLES["ledger_request"]
RECORDS = _TABLES["ledger_record"]
PAYERS = _TABLES["ledger_payer"]
USAGE = _TABLES["ledger_usage"]
EARNINGS = _TABLES["ledger_earning"]
EPOCHS = _TABLES["epoch"]
EPOCH_ENTRIES = _TABLES["epoch_entry"]
EPOCH_PAYERS = _TABLES["epoch_payer"]
