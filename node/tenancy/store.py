"""The tenants, keys and private adapters of this node: in the ledger's database, and in memory for every request.

One node writes a ledger, so what memory says is what the database says: a change is committed first and shown then. That is how a
revoked key stops working at the next request, without a restart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, delete, insert, select, update

from node.errors import RequestError
from node.tenancy.api_key import ALL_BUT_ADMIN, ApiKey, Scope, digest_of, id_of, new_secret
from node.tenancy.private_adapters import PrivateAdapter
from node.tenancy.tables import KEYS, PRIVATE_ADAPTERS, TENANTS
from node.tenancy.tenant import LIMIT_NAMES, TenantLimits, TenantTerms, check_name, check_terms

_Result = TypeVar("_Result")


class Transact(Protocol):
    """Runs work in one write transaction: `Ledger.transact`, or `offline_transact` where no node runs."""

    def __call__(self, work: Callable[[Connection], _Result]) -> Awaitable[_Result]: ...


class TenantStore:
    """Tenants and keys. Belongs to one event loop; `await load()` before use.

    Args:
        transact: Where changes are made durable.
        clock_ms: UTC milliseconds.
        random_bytes: Source of keys.
    """

    def __init__(
        self, transact: Transact, clock_ms: Callable[[], int], random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._transact = transact
        self._clock_ms = clock_ms
        self._random_bytes = random_bytes
        self._terms: dict[str, TenantTerms] = {}
        self._keys: dict[str, ApiKey] = {}
        self._private: dict[str, PrivateAdapter] = {}

    async def load(self) -> None:
        """Read everything.

        Raises:
            LedgerError: The database does not answer.
        """
        self._terms, self._keys, self._private = await self._transact(_read)

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made: from then on the node is closed, also when the last one is revoked."""
        return bool(self._keys)

    def key(self, key_id: str) -> ApiKey | None:
        """The key with this public id."""
        return self._keys.get(key_id)

    def all_keys(self) -> Sequence[ApiKey]:
        """All keys, revoked ones too, by tenant, oldest first."""
        return sorted(self._keys.values(), key=lambda key: (key.tenant, key.created_ms, key.key_id))

    def terms(self, tenant: str) -> TenantTerms:
        """What was agreed with a tenant; the plain terms for one without any."""
        return self._terms.get(tenant) or TenantTerms(tenant)

    def private_adapter(self, name: str) -> PrivateAdapter | None:
        """Who may use an adapter name, in whatever revision; None for everybody."""
        return self._private.get(name.partition("@")[0])

    async def create_key(self, terms: TenantTerms, scopes: Iterable[Scope], expires_ms: int | None = None) -> tuple[ApiKey, str]:
        """Make a key for a tenant, and the tenant where it is new.

        Args:
            terms: The tenant's terms from now on; they hold for all of its keys together.
            expires_ms: UTC milliseconds, or None.

        Returns:
            The key as it is kept, and the secret itself, which exists nowhere else.

        Raises:
            RequestError: A name, limit, scope or time that cannot be. LedgerError: Nothing was made.
        """
        check_terms(terms)
        chosen, now_ms = frozenset(scopes), self._clock_ms()
        if not chosen:
            raise RequestError("a key without scopes opens nothing; name at least one", param="scopes")
        if expires_ms is not None and expires_ms <= now_ms:
            raise RequestError("the key would have expired already; choose a later time", param="expires_ms")
        secret = new_secret(self._random_bytes)
        digest = digest_of(secret)
        key = ApiKey(id_of(secret, digest), terms.name, digest, chosen, now_ms, expires_ms)
        await self._transact(lambda connection: _add(connection, [terms], [key]))
        self._terms[terms.name], self._keys[key.key_id] = terms, key
        return key, secret

    async def revoke(self, key_id: str) -> ApiKey:
        """End a key, now and for good. A second time changes nothing.

        Raises:
            RequestError: key_not_found. LedgerError: It is not revoked.
        """
        key = self.known(key_id)
        if key.revoked_ms is not None:
            return key
        revoked = replace(key, revoked_ms=self._clock_ms())
        change = update(KEYS).where(KEYS.c.key_id == key.key_id).values(revoked_ms=revoked.revoked_ms)
        await self._transact(lambda connection: _run(connection, change))
        self._keys[key.key_id] = revoked
        return revoked

    async def set_terms(self, terms: TenantTerms) -> None:
        """Change what was agreed with a tenant that has a key.

        Raises:
            RequestError: No such tenant, or a limit out of range. LedgerError: Nothing changed.
        """
        check_terms(terms)
        if terms.name not in self._terms:
            raise RequestError(f"there is no tenant {terms.name!r}; create a key for it first", param="tenant")
        await self._transact(lambda connection: _add(connection, [terms], []))
        self._terms[terms.name] = terms

    async def import_keys(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Take over the keys of `server.api_keys_file`, which says which of them exist: one that left the file is forgotten. One
        that was revoked here stays so for as long as it is listed.

        Args:
            pairs: (tenant, key), every key once; none where the setting is empty.

        Raises:
            LedgerError: Nothing was taken over.
        """
        now_ms, listed = self._clock_ms(), {}
        for tenant, secret in pairs:
            digest = digest_of(secret)
            key_id = id_of(secret, digest)
            known = self._keys.get(key_id)
            if known is None or known.tenant != tenant:
                known = ApiKey(key_id, tenant, digest, ALL_BUT_ADMIN, now_ms, is_imported=True)
            listed[key_id] = known
        gone = [key.key_id for key in self._keys.values() if key.is_imported and key.key_id not in listed]
        changed = [key for key in listed.values() if self._keys.get(key.key_id) != key]
        fresh = [TenantTerms(tenant) for tenant in dict.fromkeys(tenant for tenant, _ in pairs) if tenant not in self._terms]

        def replace_all(connection: Connection) -> None:
            _add(connection, fresh, changed)
            for key_id in gone:
                connection.execute(delete(KEYS).where(KEYS.c.key_id == key_id))

        if changed or fresh or gone:
            await self._transact(replace_all)
        self._terms.update({terms.name: terms for terms in fresh})
        self._keys.update({key.key_id: key for key in changed})
        for key_id in gone:
            del self._keys[key_id]

    async def restrict_adapter(self, adapter: PrivateAdapter) -> None:
        """Make an adapter name private.

        Raises:
            RequestError: An owner or tenant whose name cannot be. LedgerError: Nothing changed.
        """
        for tenant in (adapter.owner, *adapter.allowed):
            check_name(tenant)
        await self._transact(lambda connection: _restrict(connection, adapter))
        self._private[adapter.name] = adapter

    async def release_adapter(self, name: str) -> None:
        """Make an adapter name public again.

        Raises:
            LedgerError: Nothing changed.
        """
        change = delete(PRIVATE_ADAPTERS).where(PRIVATE_ADAPTERS.c.name == name)
        await self._transact(lambda connection: _run(connection, change))
        self._private.pop(name, None)

    def known(self, key_id: str) -> ApiKey:
        """The key with this id.

        Raises:
            RequestError: key_not_found.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise RequestError(f"there is no key {key_id[:40]!r}; list them with: openlora-node keys list", code="key_not_found")
        return key


def _read(connection: Connection) -> tuple[dict[str, TenantTerms], dict[str, ApiKey], dict[str, PrivateAdapter]]:
    terms = {
        row.name: TenantTerms(row.name, row.weight, TenantLimits(**{name: getattr(row, name) for name in LIMIT_NAMES}))
        for row in connection.execute(select(TENANTS))
    }
    keys = {
        row.key_id: ApiKey(
            row.key_id,
            row.tenant,
            row.digest,
            frozenset(Scope(word) for word in row.scopes.split()),
            row.created_ms,
            row.expires_ms,
            row.revoked_ms,
            row.is_imported,
        )
        for row in connection.execute(select(KEYS))
    }
    private = {
        row.name: PrivateAdapter(row.name, row.owner, frozenset(json.loads(row.allowed)))
        for row in connection.execute(select(PRIVATE_ADAPTERS))
    }
    return terms, keys, private


def _add(connection: Connection, terms: Sequence[TenantTerms], keys: Sequence[ApiKey]) -> None:
    """Write tenants and keys, in place of what they were. Tenants first: keys refer to them."""
    for item in terms:
        values: dict[str, Any] = {"weight": item.weight, **{name: getattr(item.limits, name) for name in LIMIT_NAMES}}
        if not connection.execute(update(TENANTS).where(TENANTS.c.name == item.name).values(**values)).rowcount:
            connection.execute(insert(TENANTS).values(name=item.name, **values))
    for key in keys:
        row = {
            "tenant": key.tenant,
            "digest": key.digest,
            "scopes": " ".join(sorted(key.scopes)),
            "created_ms": key.created_ms,
            "expires_ms": key.expires_ms,
            "revoked_ms": key.revoked_ms,
            "is_imported": key.is_imported,
        }
        if not connection.execute(update(KEYS).where(KEYS.c.key_id == key.key_id).values(**row)).rowcount:
            connection.execute(insert(KEYS).values(key_id=key.key_id, **row))


def _restrict(connection: Connection, adapter: PrivateAdapter) -> None:
    connection.execute(delete(PRIVATE_ADAPTERS).where(PRIVATE_ADAPTERS.c.name == adapter.name))
    allowed = json.dumps(sorted(adapter.allowed))
    connection.execute(insert(PRIVATE_ADAPTERS).values(name=adapter.name, owner=adapter.owner, allowed=allowed))


def _run(connection: Connection, statement: Any) -> None:
    connection.execute(statement)
