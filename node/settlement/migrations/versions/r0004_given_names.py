"""Names that callers and the operator gave to adapters, so that a restart keeps them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table of `node.tenancy.given_names`."""
    op.create_table(
        "given_name",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(300), primary_key=True),
        sa.Column("target", sa.Text, nullable=True),
        sa.Column("source", sa.String(32), nullable=True),
        sa.Column("needs_token", sa.Boolean, nullable=False),
    )
