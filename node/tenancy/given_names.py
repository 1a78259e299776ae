"""Names that were given to adapters, in the ledger's database. The catalog keeps them in memory; this makes them outlive it.

No token is in here: a name whose adapter is asked for with a token waits after a restart until somebody sends one.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from node.adapters.registrations import GivenName
from node.tenancy.store import Transact
from node.tenancy.tables import GIVEN_NAMES


class GivenNames:
    """The table of names.

    Args:
        transact: Where changes are made durable.
    """

    def __init__(self, transact: Transact) -> None:
        self._transact = transact

    async def all(self) -> Sequence[GivenName]:
        """Every name, in the order of owner and name.

        Raises:
            LedgerError: The database does not answer.
        """
        return await self._transact(_read)

    async def keep(self, given: GivenName) -> None:
        """Write a name in place of what it stood for before.

        Raises:
            LedgerError: Nothing changed.
        """
        await self._transact(lambda connection: _write(connection, given))

    async def forget(self, owner: str, name: str) -> None:
        """Remove a name; one that is not there changes nothing.

        Raises:
            LedgerError: Nothing changed.
        """
        await self._transact(lambda connection: _remove(connection, owner, name))


def _read(connection: Connection) -> list[GivenName]:
    rows = connection.execute(select(GIVEN_NAMES).order_by(GIVEN_NAMES.c.owner, GIVEN_NAMES.c.name))
    return [GivenName(row.owner, row.name, row.target, row.source, row.needs_token) for row in rows]


def _write(connection: Connection, given: GivenName) -> None:
    _remove(connection, given.owner, given.name)
    connection.execute(
        insert(GIVEN_NAMES).values(
            owner=given.owner, name=given.name, target=given.target, source=given.source, needs_token=given.needs_token
        )
    )


def _remove(connection: Connection, owner: str, name: str) -> None:
    connection.execute(delete(GIVEN_NAMES).where(GIVEN_NAMES.c.owner == owner, GIVEN_NAMES.c.name == name))
