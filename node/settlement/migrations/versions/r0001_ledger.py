"""Records, open requests, payers, earnings, epochs and chain intents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_WEI = sa.String(78)
_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables of an empty database."""
    op.create_table("ledger_meta", sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text, nullable=False))
    op.create_table(
        "ledger_request",
        sa.Column("request_id", sa.String(128), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    _create_records()
    op.create_table(
        "ledger_payer",
        sa.Column("payer", sa.String(42), primary_key=True),
        sa.Column("used_wei", _WEI, nullable=False),
        sa.Column("operator", sa.String(42), nullable=False),
        sa.Column("cumulative_wei", _WEI, nullable=False),
        sa.Column("deadline", _WEI, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "ledger_earning",
        sa.Column("account", sa.String(42), primary_key=True),
        sa.Column("adapter_id", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(16), primary_key=True),
        sa.Column("recorded_wei", _WEI, nullable=False),
        sa.Column("payable_wei", _WEI, nullable=False),
        sa.Column("request_count", sa.BigInteger, nullable=False),
    )
    _create_epochs()
    op.create_table(
        "chain_intent",
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(200), nullable=False, unique=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("after", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=True),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_chain_intent_state", "chain_intent", ["state"])


def _create_records() -> None:
    op.create_table(
        "ledger_record",
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("request_id", sa.String(128), nullable=False, unique=True),
        sa.Column("record_hash", sa.String(64), nullable=False, unique=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("payer", sa.String(42), nullable=True),
        sa.Column("fee_wei", _WEI, nullable=False),
        sa.Column("finished_ms", sa.BigInteger, nullable=False),
        sa.Column("chain_id", sa.BigInteger, nullable=False),
        sa.Column("signer", sa.String(42), nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
        sa.Column("prompt_salt", sa.LargeBinary, nullable=False),
        sa.Column("output_salt", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_ledger_record_payer", "ledger_record", ["payer"])


def _create_epochs() -> None:
    op.create_table(
        "epoch",
        sa.Column("serial", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("epoch_id", sa.BigInteger, nullable=False),
        sa.Column("intent_key", sa.String(200), nullable=False, unique=True),
        sa.Column("chain_id", sa.BigInteger, nullable=False),
        sa.Column("rewards", sa.String(42), nullable=False),
        sa.Column("operator", sa.String(42), nullable=False),
        sa.Column("root", sa.String(64), nullable=False),
        sa.Column("receipts_root", sa.String(64), nullable=False),
        sa.Column("leaves_hash", sa.String(64), nullable=False),
        sa.Column("total_wei", _WEI, nullable=False),
        sa.Column("record_count", sa.BigInteger, nullable=False),
        sa.Column("closed_ms", sa.BigInteger, nullable=False),
    )
    for name, key, extra in (
        ("epoch_entry", "account", [sa.Column("cumulative_wei", _WEI, nullable=False)]),
        (
            "epoch_payer",
            "payer",
            [sa.Column("used_wei", _WEI, nullable=False), sa.Column("last_sequence", sa.BigInteger, nullable=False)],
        ),
    ):
        op.create_table(
            name,
            sa.Column("serial", sa.BigInteger, sa.ForeignKey("epoch.serial"), primary_key=True),
            sa.Column(key, sa.String(42), primary_key=True),
            *extra,
        )
