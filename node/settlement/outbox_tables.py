"""What the outbox remembers: one row for each nonce, one for each signed version of it, one for each block it was seen in.

in_progress -> unconfirmed -> confirmed -> finalized      mined with success, or
                              reverted                    mined and refused by the contract
                              lost                        the nonce was used by a transaction that is not ours
in_progress -> abandoned                                  no endpoint can ever mine it; the nonce is free again
confirmed   -> unconfirmed                                a reorganisation took its block away
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Integer, LargeBinary, String, Text, UniqueConstraint
from sqlmodel import Field, SQLModel

IN_PROGRESS = "in_progress"  # signed and stored; nobody may have heard of it
UNCONFIRMED = "unconfirmed"  # an endpoint has it, or had it
CONFIRMED = "confirmed"  # mined with success, as deep as the settings ask
FINALIZED = "finalized"  # no reorganisation can take it away
REVERTED = "reverted"
LOST = "lost"
ABANDONED = "abandoned"
OPEN_STATES = (IN_PROGRESS, UNCONFIRMED, CONFIRMED)  # looked at on every run

_SERIAL = BigInteger().with_variant(Integer, "sqlite")


class ChainTx(SQLModel, table=True):
    """One nonce of one account on one chain, spent on one intent."""

    __tablename__ = "chain_tx"
    __table_args__ = (UniqueConstraint("chain", "account", "nonce", name="uq_chain_tx_nonce"),)

    id: int | None = Field(default=None, primary_key=True, sa_type=_SERIAL)
    chain: str = Field(max_length=66)  # hash of the chain's first block: an id alone may name two chains
    account: str = Field(max_length=42)
    nonce: int | None = Field(default=None, sa_type=BigInteger)  # None once abandoned
    intent_key: str = Field(max_length=200, index=True)
    state: str = Field(max_length=16, index=True)
    request: str = Field(sa_type=Text)  # to, data, value and gas as JSON: what a replacement must repeat
    created_ms: int = Field(sa_type=BigInteger)
    foreign_since_ms: int | None = Field(default=None, sa_type=BigInteger)  # when its nonce was first seen spent elsewhere


class ChainAttempt(SQLModel, table=True):
    """One signed version of a transaction; written before it is sent."""

    __tablename__ = "chain_attempt"

    id: int | None = Field(default=None, primary_key=True, sa_type=_SERIAL)
    tx_id: int = Field(sa_type=BigInteger, index=True)
    raw: bytes = Field(sa_type=LargeBinary)
    hash: str = Field(unique=True, max_length=66)
    max_fee_wei: str = Field(max_length=78)
    priority_fee_wei: str = Field(max_length=78)
    created_ms: int = Field(sa_type=BigInteger)
    sent_ms: int | None = Field(default=None, sa_type=BigInteger)
    outcome: str | None = Field(default=None, max_length=32)  # of the last send
    was_maybe_sent: bool = Field(default=False)


class ChainReceipt(SQLModel, table=True):
    """A block in which an attempt was seen; a reorganisation adds a second one."""

    __tablename__ = "chain_receipt"
    __table_args__ = (UniqueConstraint("attempt_id", "block_hash", name="uq_chain_receipt_block"),)

    id: int | None = Field(default=None, primary_key=True, sa_type=_SERIAL)
    attempt_id: int = Field(sa_type=BigInteger, index=True)
    block_number: int = Field(sa_type=BigInteger)
    block_hash: str = Field(sa_type=String(66))
    has_succeeded: bool
    gas_used: int = Field(sa_type=BigInteger)
    gas_price_wei: str = Field(max_length=78)
    seen_ms: int = Field(sa_type=BigInteger)


TXS = SQLModel.metadata.tables["chain_tx"]
ATTEMPTS = SQLModel.metadata.tables["chain_attempt"]
RECEIPTS = SQLModel.metadata.tables["chain_receipt"]
