"""Adapters that not everybody may use.

What a tenant may not use does not exist for it: the catalog looks past the name as if no directory had it, so that answer and
work are those of an unknown name. A content hash finds an adapter only through a name that the caller may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.adapters.locations import Location, is_location, parse_location
from node.config import StoreSettings
from node.errors import AdapterError, ConfigError, RequestError
from node.tenancy.tenant import check_name


@dataclass(frozen=True, slots=True)
class PrivateAdapter:
    """One private name: its owner, and tenants the owner shares it with."""

    name: str
    owner: str
    allowed: frozenset[str] = frozenset()

    def admits(self, tenant: str) -> bool:
        """Whether the tenant may know of it."""
        return tenant == self.owner or tenant in self.allowed


class StoreRules:
    """Stores whose adapters exist for some tenants alone.

    Args:
        stores: The operator's; those that name no tenant are for everybody.

    Raises:
        ConfigError: A tenant's name cannot be.
    """

    def __init__(self, stores: Sequence[StoreSettings]) -> None:
        self._rules = [_rule(store) for store in stores if store.tenants]

    def admits(self, name: str, tenant: str | None) -> bool:
        """Whether the tenant may know of the adapter at a location, None: whether everybody may. Where stores lie in one another
        each of them has to admit. Other names are for everybody."""
        if not self._rules or not is_location(name):
            return True
        try:
            location = parse_location(name)
        except AdapterError:
            return True  # refused elsewhere, the same for all
        return all(tenant in tenants for root, tenants in self._rules if location.is_under(root))


def _rule(store: StoreSettings) -> tuple[Location, frozenset[str]]:
    try:
        tenants = frozenset(check_name(tenant) for tenant in store.tenants)
        return parse_location(store.url, may_be_root=True), tenants
    except (AdapterError, RequestError) as error:
        raise ConfigError(f"adapters.stores: {error.message}") from error
