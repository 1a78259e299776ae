"""Everything about tenants that the request path asks, as one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from node.adapters.entry import NameFilter
from node.config import StoreSettings, TenantSettings
from node.settlement.ledger import Ledger
from node.tenancy.door import Door
from node.tenancy.meter import Meter, Usage
from node.tenancy.private_adapters import StoreRules
from node.tenancy.store import TenantStore
from node.tenancy.tenant import ANONYMOUS


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Who calls, what is left for them, and which adapters exist for them."""

    store: TenantStore
    door: Door
    meter: Meter
    store_rules: StoreRules = field(default_factory=lambda: StoreRules(()))

    def sees(self, tenant: str) -> NameFilter:
        """Which adapter names exist for a tenant."""

        def is_visible(name: str) -> bool:
            private = self.store.private_adapter(name)
            return (private is None or private.admits(tenant)) and self.store_rules.admits(name, tenant)

        return is_visible

    def owner(self, tenant: str) -> str:
        """Whose registered adapter names a tenant uses; on a node without keys everybody shares the operator's."""
        return "" if tenant == ANONYMOUS else tenant

    def sees_of_owner(self, owner: str) -> NameFilter:
        """`sees` for whoever owns registered names."""
        return self.sees(owner or ANONYMOUS)

    def weight_of_owner(self, owner: str) -> int:
        """What an owner of registered names weighs against others."""
        return self.store.terms(owner or ANONYMOUS).weight

    def is_public(self, name: str) -> bool:
        """Whether everybody may know of an adapter name."""
        return self.store.private_adapter(name) is None and self.store_rules.admits(name, None)


async def open_tenancy(
    ledger: Ledger,
    settings: TenantSettings,
    key_lines: Sequence[tuple[str, str]],
    stores: Sequence[StoreSettings] = (),
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Tenancy:
    """Load tenants and keys, take over those of the key file, and remember what was used this month.

    Args:
        key_lines: From `read_key_file`; none where there is no such file.
        stores: Places outside the hub, some of them for some tenants alone.

    Raises:
        ConfigError: A store names a tenant that cannot be.
        LedgerError: The ledger does not answer.
    """

    def clock_ms() -> int:
        return int(now().timestamp() * 1000)

    store = TenantStore(ledger.transact, clock_ms)
    await store.load()
    await store.import_keys(key_lines)
    today = now().strftime("%Y-%m-%d")
    sums: dict[str, Usage] = {}
    for row in await ledger.usage(today[:7]):
        usage = sums.setdefault(row.tenant_digest, Usage(today))
        usage.tokens_per_month += row.tokens
        usage.wei_per_month += row.wei
        if row.day == today:
            usage.tokens_per_day += row.tokens
            usage.wei_per_day += row.wei
    meter = Meter(clock, now, lambda tenant: sums.get(ledger.tenant_digest(tenant)))
    return Tenancy(store, Door(store, settings, clock, clock_ms), meter, StoreRules(stores))
