"""Transactions of the outbox: one row a nonce, a signed version, a block it was seen in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add the outbox's tables."""
    op.create_table(
        "chain_tx",
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("chain", sa.String(66), nullable=False),
        sa.Column("account", sa.String(42), nullable=False),
        sa.Column("nonce", sa.BigInteger, nullable=True),
        sa.Column("intent_key", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("foreign_since_ms", sa.BigInteger, nullable=True),
        sa.UniqueConstraint("chain", "account", "nonce", name="uq_chain_tx_nonce"),
    )
    op.create_index("ix_chain_tx_intent_key", "chain_tx", ["intent_key"])
    op.create_index("ix_chain_tx_state", "chain_tx", ["state"])
    op.create_table(
        "chain_attempt",
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("tx_id", sa.BigInteger, nullable=False),
        sa.Column("raw", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.String(66), nullable=False, unique=True),
        sa.Column("max_fee_wei", sa.String(78), nullable=False),
        sa.Column("priority_fee_wei", sa.String(78), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("sent_ms", sa.BigInteger, nullable=True),
        sa.Column("outcome", sa.String(32), nullable=True),
        sa.Column("was_maybe_sent", sa.Boolean, nullable=False),
    )
    op.create_index("ix_chain_attempt_tx_id", "chain_attempt", ["tx_id"])
    op.create_table(
        "chain_receipt",
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("attempt_id", sa.BigInteger, nullable=False),
        sa.Column("block_number", sa.BigInteger, nullable=False),
        sa.Column("block_hash", sa.String(66), nullable=False),
        sa.Column("has_succeeded", sa.Boolean, nullable=False),
        sa.Column("gas_used", sa.BigInteger, nullable=False),
        sa.Column("gas_price_wei", sa.String(78), nullable=False),
        sa.Column("seen_ms", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("attempt_id", "block_hash", name="uq_chain_receipt_block"),
    )
    op.create_index("ix_chain_receipt_attempt_id", "chain_receipt", ["attempt_id"])
