"""Tenants and keys while no node runs: the ledger's database, opened for the length of one command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from node.settlement.ledger_database import DatabaseLock, explain, make_engine, migrate, parse_url
from node.tenancy.store import Transact

_Result = TypeVar("_Result")


@asynccontextmanager
async def offline_transact(url: str) -> AsyncIterator[Transact]:
    """Lock and migrate the database; yields what a `TenantStore` writes through.

    Raises:
        LedgerError: ledger_locked (a node runs on it), or why it cannot be opened.
    """
    parsed = parse_url(url)
    engine = make_engine(parsed)

    def run(work: Callable[[Connection], _Result]) -> _Result:
        try:
            with engine.begin() as connection:
                return work(connection)
        except (SQLAlchemyError, OSError) as error:
            raise explain(error, parsed) from error

    async def transact(work: Callable[[Connection], _Result]) -> _Result:
        return await asyncio.to_thread(run, work)

    lock = None
    try:
        try:
            lock = await asyncio.to_thread(DatabaseLock, parsed, engine)
            await asyncio.to_thread(migrate, engine)
        except (SQLAlchemyError, OSError) as error:
            raise explain(error, parsed) from error
        yield transact
    finally:
        if lock is not None:
            lock.release()
        engine.dispose()
