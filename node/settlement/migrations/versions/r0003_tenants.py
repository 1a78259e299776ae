"""Tenants: who they are, their keys' digests, their private adapters, what they used by day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables of `node.tenancy`, and the usage that the ledger's writer keeps for them."""
    op.create_table(
        "tenant",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("weight", sa.BigInteger, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger, nullable=True),
        sa.Column("max_concurrent", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_day", sa.BigInteger, nullable=True),
        sa.Column("tokens_per_month", sa.BigInteger, nullable=True),
        sa.Column("wei_per_day", sa.String(78), nullable=True),
        sa.Column("wei_per_month", sa.String(78), nullable=True),
    )
    op.create_table(
        "api_key",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), sa.ForeignKey("tenant.name"), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=True),
        sa.Column("revoked_ms", sa.BigInteger, nullable=True),
        sa.Column("is_imported", sa.Boolean, nullable=False),
    )
    op.create_index("ix_api_key_tenant", "api_key", ["tenant"])
    op.create_table(
        "private_adapter",
        sa.Column("name", sa.String(300), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("allowed", sa.Text, nullable=False),
    )
    op.create_table(
        "ledger_usage",
        sa.Column("tenant_digest", sa.String(64), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("wei", sa.String(78), nullable=False),
    )
    op.create_index("ix_ledger_usage_day", "ledger_usage", ["day"])
