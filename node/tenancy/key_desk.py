"""What an operator can ask about keys, as JSON in and JSON out: in the running node, or on its ledger while none runs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from node.errors import RequestError
from node.tenancy.api_key import ApiKey, Scope
from node.tenancy.meter import Meter
from node.tenancy.store import TenantStore
from node.tenancy.tenant import LIMIT_NAMES, TenantTerms

Operation = Callable[..., Awaitable[Any]]
_DAY_MS = 24 * 3600 * 1000


def key_operations(store: TenantStore, meter: Meter | None = None) -> dict[str, Operation]:
    """keys.create, keys.list, keys.show, keys.revoke, keys.limit.

    Args:
        meter: What tenants have used; None while no node runs.
    """
    desk = _KeyDesk(store, meter)
    return {
        "keys.create": desk.create,
        "keys.list": desk.list,
        "keys.show": desk.show,
        "keys.revoke": desk.revoke,
        "keys.limit": desk.limit,
    }


class _KeyDesk:
    """The operations of one store."""

    def __init__(self, store: TenantStore, meter: Meter | None) -> None:
        self._store = store
        self._meter = meter

    async def create(
        self, tenant: str, scopes: Sequence[str], expires_days: float | None, weight: int | None, limits: Mapping[str, int]
    ) -> dict[str, Any]:
        """Make a key. The answer holds it in clear, this once."""
        expires_ms = None if expires_days is None else _now_ms() + int(expires_days * _DAY_MS)
        key, secret = await self._store.create_key(
            _changed(self._store.terms(tenant), weight, limits), [_scope(word) for word in scopes], expires_ms
        )
        return {**_key(key), "key": secret}

    async def list(self) -> list[dict[str, Any]]:
        """Every key, without what opens anything."""
        return [_key(key) for key in self._store.all_keys()]

    async def show(self, key_id: str) -> dict[str, Any]:
        """One key, its tenant's terms, and what that tenant used today and this month where a node runs."""
        key = self._store.known(key_id)
        terms = self._store.terms(key.tenant)
        used = None if self._meter is None else _as_text(asdict(self._meter.usage(key.tenant)))
        return {**_key(key), "weight": terms.weight, "limits": _as_text(asdict(terms.limits)), "used": used}

    async def revoke(self, key_id: str) -> dict[str, Any]:
        """End a key now."""
        return _key(await self._store.revoke(key_id))

    async def limit(self, tenant: str, weight: int | None, limits: Mapping[str, int]) -> dict[str, Any]:
        """Change a tenant's terms; what is not named stays."""
        terms = _changed(self._store.terms(tenant), weight, limits)
        await self._store.set_terms(terms)
        return {"tenant": tenant, "weight": terms.weight, "limits": _as_text(asdict(terms.limits))}


def _changed(terms: TenantTerms, weight: int | None, limits: Mapping[str, int]) -> TenantTerms:
    for name in limits:
        if name not in LIMIT_NAMES:
            raise RequestError(f"there is no limit {name[:40]!r}; use one of {', '.join(LIMIT_NAMES)}", param="limits")
    return replace(terms, weight=terms.weight if weight is None else weight, limits=replace(terms.limits, **limits))


def _scope(word: str) -> Scope:
    try:
        return Scope(word)
    except ValueError as error:
        raise RequestError(f"there is no scope {word[:40]!r}; use one of {', '.join(Scope)}", param="scopes") from error


def _key(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "state": key.state(_now_ms()),
        "created_ms": key.created_ms,
        "expires_ms": key.expires_ms,
        "revoked_ms": key.revoked_ms,
        "is_imported": key.is_imported,
    }


def _as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's numbers end at 2**53: wei travel as text."""
    return {name: str(value) if name.startswith("wei_") and value is not None else value for name, value in values.items()}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
