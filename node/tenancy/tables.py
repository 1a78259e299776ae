"""What the node remembers of its tenants, in the ledger's database. No key is in here, only digests.

What tenants have used is `node.settlement.tables.LedgerUsage`: it is written with the records it follows from.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, LargeBinary, Text
from sqlmodel import Field, SQLModel

from node.settlement.tables import Wei


class TenantRow(SQLModel, table=True):
    """A tenant's terms. A limit that is NULL follows the node's default, 0 means none."""

    __tablename__ = "tenant"

    name: str = Field(primary_key=True, max_length=64)
    weight: int = Field(sa_type=BigInteger)
    requests_per_minute: int | None = Field(default=None, sa_type=BigInteger)
    tokens_per_minute: int | None = Field(default=None, sa_type=BigInteger)
    max_concurrent: int | None = Field(default=None, sa_type=BigInteger)
    tokens_per_day: int | None = Field(default=None, sa_type=BigInteger)
    tokens_per_month: int | None = Field(default=None, sa_type=BigInteger)
    wei_per_day: int | None = Field(default=None, sa_type=Wei)
    wei_per_month: int | None = Field(default=None, sa_type=Wei)


class ApiKeyRow(SQLModel, table=True):
    """A key of a tenant; a revoked one stays, so that it is never mistaken for an unknown one in an audit."""

    __tablename__ = "api_key"

    key_id: str = Field(primary_key=True, max_length=32)
    tenant: str = Field(foreign_key="tenant.name", index=True, max_length=64)
    digest: bytes = Field(sa_type=LargeBinary)
    scopes: str = Field(max_length=200)  # separated by spaces
    created_ms: int = Field(sa_type=BigInteger)
    expires_ms: int | None = Field(default=None, sa_type=BigInteger)
    revoked_ms: int | None = Field(default=None, sa_type=BigInteger)
    is_imported: bool


class PrivateAdapterRow(SQLModel, table=True):
    """An adapter name that only some tenants may use. `allowed` is a JSON list of tenants beside the owner."""

    __tablename__ = "private_adapter"

    name: str = Field(primary_key=True, max_length=300)
    owner: str = Field(max_length=64)
    allowed: str = Field(sa_type=Text)


class GivenNameRow(SQLModel, table=True):
    """A name that somebody gave to an adapter, or took back. See `node.adapters.registrations.GivenName`."""

    __tablename__ = "given_name"

    owner: str = Field(primary_key=True, max_length=64)
    name: str = Field(primary_key=True, max_length=300)
    target: str | None = Field(default=None, sa_type=Text)
    source: str | None = Field(default=None, max_length=32)
    needs_token: bool


TENANTS = SQLModel.metadata.tables["tenant"]
KEYS = SQLModel.metadata.tables["api_key"]
PRIVATE_ADAPTERS = SQLModel.metadata.tables["private_adapter"]
GIVEN_NAMES = SQLModel.metadata.tables["given_name"]
