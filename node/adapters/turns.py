"""Slow work shared over tenants: whose turn is next, and who gives way where there is no room. Counts only, no work.

Two bounds: `limit` items are under way together, `workers` of them run. Three rules keep one tenant from holding either:

- The next to run is the first item of the tenant that runs fewest by its weight; of equals, whose turn is longest ago.
- The last free worker is for a tenant that runs nothing. Alone, a tenant uses all but one; whoever comes finds that one, or is
  before everybody who runs something when the next one ends.
- When it is full, the newest waiting item of the tenant that has the most by its weight gives way, be it the newcomer's own. A
  tenant with nothing under way is refused only where every item that waits is the only one of its tenant.

Inside a tenant items go first come, first served: each is another adapter, so adapters take turns as well. Nobody starves: a
tenant that runs nothing waits for at most one turn of each other tenant, and what is started ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)
WeightOf = Callable[[str], int]


def same_weight(tenant: str) -> int:
    """Where nobody has agreed on weights."""
    del tenant
    return 1


class _Tenant(Generic[ItemT]):
    """A tenant with something under way."""

    __slots__ = ("name", "running_count", "turn", "waiting", "weight")

    def __init__(self, name: str, turn: int) -> None:
        self.name = name
        self.weight = 1
        self.turn = turn  # when it came, then of its last start: who comes back is behind whoever stayed
        self.running_count = 0
        self.waiting: OrderedDict[ItemT, None] = OrderedDict()

    @property
    def count(self) -> int:
        return self.running_count + len(self.waiting)

    @property
    def surplus(self) -> float:
        """What it has beyond one item, by weight: a single item is nobody's surplus, however little its tenant weighs."""
        return (self.count - 1) / self.weight

    def rank(self) -> tuple[float, int]:
        return self.running_count / self.weight, self.turn


class Turns(Generic[ItemT]):
    """Items of all tenants, each waiting or running.

    Args:
        workers: Items that run together, at least 1. limit: items under way together, at least 1.
        weight_of: A tenant's weight, at least 1; read when an item of it comes.
    """

    def __init__(self, *, workers: int, limit: int, weight_of: WeightOf = same_weight) -> None:
        self._workers = min(workers, limit)  # else the last free worker could not be kept where all places are taken
        self._limit = limit
        self._weight_of = weight_of
        self._tenants: dict[str, _Tenant[ItemT]] = {}
        self._of_item: dict[ItemT, _Tenant[ItemT]] = {}
        self._running_count = 0
        self._turn = 0

    def __len__(self) -> int:
        """Items under way."""
        return len(self._of_item)

    def join(self, tenant: str, item: ItemT) -> ItemT | None:
        """A new item waits for its tenant's turn.

        Returns:
            The item that has to give way, which is under way no more: another one, or this one; None where there is room.
        """
        newcomer = self._enter(tenant)
        self._put(newcomer, item)
        if len(self) <= self._limit:
            return None
        candidates = [found for found in self._tenants.values() if found.waiting]
        largest = max(candidates, key=lambda found: (found.surplus, found is newcomer))
        refused = next(reversed(largest.waiting))
        self.leave(refused)
        return refused

    def share(self, tenant: str, item: ItemT) -> None:
        """Another tenant wants an item too. While it waits it counts for whoever has less under way: nobody can hold up what
        others want by asking for it first, behind a crowd of its own."""
        owner = self._of_item[item]
        if owner.name == tenant or item not in owner.waiting:
            return
        known = self._tenants.get(tenant)
        count = 0 if known is None else known.count
        if count / self._weight_of(tenant) < owner.surplus:
            self.leave(item)
            self._put(self._enter(tenant), item)

    def start(self) -> ItemT | None:
        """The next item, which runs from now on; None where nothing waits that a worker is free for."""
        free_count = self._workers - self._running_count
        if free_count < 1:
            return None
        candidates = [found for found in self._tenants.values() if found.waiting and (free_count > 1 or not found.running_count)]
        if not candidates:
            return None
        tenant = min(candidates, key=_Tenant.rank)
        item, _ = tenant.waiting.popitem(last=False)
        tenant.running_count += 1
        tenant.turn = self._next_turn()
        self._running_count += 1
        return item

    def leave(self, item: ItemT) -> None:
        """An item has ended, or waits no longer."""
        tenant = self._of_item.pop(item)
        if item in tenant.waiting:
            del tenant.waiting[item]
        else:
            tenant.running_count -= 1
            self._running_count -= 1
        if not tenant.count:
            del self._tenants[tenant.name]

    def _enter(self, name: str) -> _Tenant[ItemT]:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, self._next_turn())
        tenant.weight = self._weight_of(name)
        return tenant

    def _put(self, tenant: _Tenant[ItemT], item: ItemT) -> None:
        tenant.waiting[item] = None
        self._of_item[item] = tenant

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn
