"""What is remembered of grammars: the latest few of every tenant. No torch here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")

NODE_ENTRIES = 128
TENANT_ENTRIES = 16


class GrammarCache(Generic[Value]):
    """Least recently used entries out, a tenant's own first. A tenant never finds, or is slowed by, what another one left.

    Args:
        node_entries: Over all tenants. tenant_entries: Of one tenant.
    """

    def __init__(self, node_entries: int = NODE_ENTRIES, tenant_entries: int = TENANT_ENTRIES) -> None:
        self._node_entries = node_entries
        self._tenant_entries = tenant_entries
        self._entries: OrderedDict[tuple[str, str], Value] = OrderedDict()
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tenant: str, text: str) -> Value | None:
        """The value of a grammar, which is now the most recently used."""
        value = self._entries.get((tenant, text))
        if value is not None:
            self._entries.move_to_end((tenant, text))
        return value

    def put(self, tenant: str, text: str, value: Value) -> None:
        """Remember a value; the tenant's oldest entry goes when it has too many, else the oldest of all."""
        self.discard(tenant, text)
        if self._counts.get(tenant, 0) >= self._tenant_entries:
            self.discard(*next(key for key in self._entries if key[0] == tenant))
        elif len(self._entries) >= self._node_entries:
            self.discard(*next(iter(self._entries)))
        self._entries[tenant, text] = value
        self._counts[tenant] = self._counts.get(tenant, 0) + 1

    def discard(self, tenant: str, text: str) -> None:
        """Forget a grammar, if it is known."""
        if self._entries.pop((tenant, text), None) is None:
            return
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
