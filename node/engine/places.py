"""A bounded number of places, of which one tenant cannot take the last ones from the others."""

from __future__ import annotations

_RESERVE = 8  # one place in so many is kept for tenants below their part


class Places:
    """Counts who is inside.

    Semantics:
        While more than an eighth of the places is free, anybody may enter. The rest is for tenants that hold less than an equal
        part, a newcomer counted in: a busy tenant fills seven eighths when it is alone, and gives way as its requests end.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[str, int] = {}
        self.count = 0

    def has_room(self, tenant: str) -> bool:
        """Whether one more of this tenant may enter."""
        if self.count >= self.limit:
            return False
        if self.count < self.limit - self.limit // _RESERVE:
            return True
        held = self._held.get(tenant, 0)
        others = len(self._held) - (tenant in self._held)
        return held * (others + 2) < self.limit

    def enter(self, tenant: str) -> None:
        """Take a place that `has_room` promised."""
        self._held[tenant] = self._held.get(tenant, 0) + 1
        self.count += 1

    def leave(self, tenant: str) -> None:
        """Give it back."""
        self.count -= 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
