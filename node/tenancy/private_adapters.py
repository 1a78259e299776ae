"""Adapters that not everybody may use.

What a tenant may not use does not exist for it: the catalog looks past the name as if no directory had it, so that answer and
work are those of an unknown name. A content hash finds an adapter only through a name that the caller may use.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivateAdapter:
    """One private name: its owner, and tenants the owner shares it with."""

    name: str
    owner: str
    allowed: frozenset[str] = frozenset()

    def admits(self, tenant: str) -> bool:
        """Whether the tenant may know of it."""
        return tenant == self.owner or tenant in self.allowed
