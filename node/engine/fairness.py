"""Who is next: weighted fair queueing by virtual token counters, first between tenants, then between a tenant's recipes.

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), the VTC scheduler that S-LoRA ships. Every client
has a counter of tokens served; the waiting client with the smallest counter goes next; a client that was away is lifted to the
smallest counter of those present, so that idling earns no credit. Nobody starves: whoever waits keeps its counter, others' grow.

Two levels, because adapters cost a tenant nothing: with one counter for each (tenant, recipe) a tenant with a thousand adapters
would get a thousand shares. A tenant's counter grows by cost / weight, so tenants that want the engine at the same time are
served in proportion to their weights; inside a tenant all recipes weigh the same.

A recipe whose adapters are not loaded is parked: it keeps its counters and leaves the order, so that thousands of cold adapters
stand in nobody's way. Whoever loads adapters asks for `parked` heads, which take turns between tenants.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Any

from node.engine.counter_heap import CounterHeap
from node.engine.sequence import FairKey, Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2  # the paper's weights: a decode row costs more time than a prefill row


class _Recipe:
    """Sequences of one tenant with one recipe, first come first served."""

    __slots__ = ("counter", "present", "waiting")

    def __init__(self, counter: int) -> None:
        self.counter = counter
        self.present = 0  # sequences waiting or running
        self.waiting: deque[Sequence] = deque()

    def rank(self) -> tuple[int, int]:
        return self.counter, self.waiting[0].arrival_index


class _Tenant:
    """One tenant that is present, with its recipes."""

    __slots__ = (
        "away",
        "counter",
        "loaded",
        "name",
        "open",
        "order",
        "parked",
        "present",
        "recipes",
        "returned",
        "waiting_count",
        "weight",
        "working",
    )

    def __init__(self, name: str, counter: float, order: int) -> None:
        self.name = name
        self.order = order  # of tenants that came
        self.counter = counter
        self.weight = 1
        self.present = 0
        self.waiting_count = 0
        self.recipes: dict[FairKey, _Recipe] = {}
        self.open: CounterHeap[_Recipe] = CounterHeap(_Recipe.rank)  # waiting and not parked
        self.parked: OrderedDict[_Recipe, None] = OrderedDict()  # longest parked first
        self.loaded: OrderedDict[_Recipe, None] = OrderedDict()  # not parked any more, but none of them has started
        self.returned: OrderedDict[_Recipe, None] = OrderedDict()  # parked again: their adapters may still be there
        self.working: CounterHeap[_Recipe] = CounterHeap(lambda recipe: recipe.counter)  # waiting or running
        self.away: OrderedDict[FairKey, int] = OrderedDict()

    def is_parked(self, recipe: _Recipe) -> bool:
        return recipe in self.parked or recipe in self.returned

    def park(self, recipe: _Recipe) -> None:
        if recipe in self.loaded:
            del self.loaded[recipe]
            self.returned[recipe] = None
        elif not self.is_parked(recipe):
            self.parked[recipe] = None

    def unpark(self, recipe: _Recipe) -> None:
        self.parked.pop(recipe, None)
        self.returned.pop(recipe, None)

    def forget(self, recipe: _Recipe) -> None:
        """None of its sequences waits."""
        self.unpark(recipe)
        self.loaded.pop(recipe, None)

    def rank(self) -> tuple[float, int, int]:
        """Of equal counters the one that runs less goes first: a tenant that was just lifted ties with the least served one."""
        return self.counter, self.present - self.waiting_count, self.order


class FairQueue:
    """Waiting sequences of all tenants.

    Args:
        remembered_limit: Counters kept for tenants that are away, and for recipes that are away while their tenant is present;
            the ones away longest are forgotten first.
    """

    def __init__(self, remembered_limit: int = 4096) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._open: CounterHeap[_Tenant] = CounterHeap(_Tenant.rank)  # with a recipe that may be next
        self._working: CounterHeap[_Tenant] = CounterHeap(lambda tenant: tenant.counter)
        self._away: OrderedDict[str, float] = OrderedDict()
        self._remembered_limit = remembered_limit
        self._arrivals = 0
        self._count = 0

    def __len__(self) -> int:
        """Sequences waiting."""
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._tenants.values():
            for recipe in tenant.recipes.values():
                yield from recipe.waiting

    # ---- coming and going

    def join(self, sequence: Sequence) -> None:
        """A new sequence arrives; its tenant weighs what this request says from now on."""
        tenant = self._tenants.get(sequence.tenant) or self._enter(sequence.tenant)
        tenant.weight = sequence.weight
        recipe = tenant.recipes.get(sequence.fair_key)
        if recipe is None:
            least = tenant.working.least()
            recipe = _Recipe(max(tenant.away.pop(sequence.fair_key, 0), 0 if least is None else least.counter))
            tenant.recipes[sequence.fair_key] = recipe
            tenant.working.add(recipe)
        tenant.present += 1
        recipe.present += 1
        recipe.waiting.append(sequence)
        self._count_waiting(tenant, 1)
        self._offer(tenant, recipe)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, before its recipe's others."""
        tenant, recipe = self._find(sequence.fair_key)
        recipe.waiting.appendleft(sequence)
        self._count_waiting(tenant, 1)
        tenant.open.remove(recipe)
        self._offer(tenant, recipe)
        self._rerank(tenant)

    def take(self, sequence: Sequence) -> None:
        """A waiting sequence stops waiting; it stays present until `leave`."""
        tenant, recipe = self._find(sequence.fair_key)
        if recipe.waiting[0] is sequence:
            recipe.waiting.popleft()
        else:
            recipe.waiting.remove(sequence)
        self._count_waiting(tenant, -1)
        if not recipe.waiting:
            tenant.forget(recipe)
            self._withdraw(tenant, recipe)

    def leave(self, sequence: Sequence) -> None:
        """A sequence that no longer waits is finished."""
        tenant, recipe = self._find(sequence.fair_key)
        recipe.present -= 1
        if not recipe.present:
            del tenant.recipes[sequence.fair_key]
            tenant.working.remove(recipe)
            tenant.away[sequence.fair_key] = recipe.counter
            _forget(tenant.away, self._remembered_limit)
        tenant.present -= 1
        if not tenant.present:
            del self._tenants[tenant.name]
            self._working.remove(tenant)
            self._away[tenant.name] = tenant.counter
            _forget(self._away, self._remembered_limit)
        else:
            self._rerank(tenant)

    # ---- service

    def charge(self, key: FairKey, cost: int) -> None:
        """A present tenant's recipe was served `cost` weighted tokens."""
        tenant, recipe = self._find(key)
        tenant.counter += cost / tenant.weight
        recipe.counter += cost

    def counter(self, key: FairKey) -> tuple[float, int]:
        """Weighted tokens that a present tenant was served by its weight, and one recipe of it, each from its last lift."""
        tenant, recipe = self._find(key)
        return tenant.counter, recipe.counter

    def weights(self) -> dict[str, int]:
        """Tenants present, with what they weigh."""
        return {name: tenant.weight for name, tenant in self._tenants.items()}

    @property
    def open_tenants(self) -> set[str]:
        """Tenants with a sequence that waits and is not parked."""
        return {tenant.name for tenant in self._open}

    # ---- order

    def first(self) -> Sequence | None:
        """The fairest waiting sequence that is not parked."""
        tenant = self._open.least()
        recipe = None if tenant is None else tenant.open.least()
        return None if recipe is None else recipe.waiting[0]

    def open_sequences(self) -> Iterator[Sequence]:
        """Waiting sequences that are not parked, in no order."""
        for tenant in self._open:
            for recipe in tenant.open:
                yield from recipe.waiting

    def in_order(self) -> Generator[Sequence, None, None]:
        """Yield waiting sequences that are not parked, fairest first, following everything that happens between two yields.

        A sequence that the caller neither takes nor parks is passed over, with all others of its recipe, until the walk is over.
        Close the walk (`contextlib.closing`) where it is left early.
        """
        passed: list[tuple[_Tenant, _Recipe]] = []
        try:
            while (tenant := self._open.least()) is not None:
                recipe = tenant.open.least()
                if recipe is None:
                    raise RuntimeError(f"tenant {tenant.name} is in the order without a recipe that waits")
                head = recipe.waiting[0]
                yield head
                if recipe in tenant.open and recipe.waiting[0] is head:
                    self._withdraw(tenant, recipe)
                    passed.append((tenant, recipe))
        finally:
            for tenant, recipe in passed:
                if recipe.waiting:
                    self._offer(tenant, recipe)

    def park(self, sequence: Sequence) -> None:
        """The adapters of a waiting sequence are not loaded: its recipe leaves the order.

        One that was loaded before, and could not start, does not stand behind those that never were.
        """
        tenant, recipe = self._find(sequence.fair_key)
        tenant.park(recipe)
        self._withdraw(tenant, recipe)

    def unpark(self, sequence: Sequence) -> None:
        """They are loaded."""
        tenant, recipe = self._find(sequence.fair_key)
        tenant.unpark(recipe)
        tenant.loaded[recipe] = None
        self._offer(tenant, recipe)

    def favour(self, limit: int, may_go_first: Callable[[Sequence], bool]) -> bool:
        """Park all recipes but at most `limit` whose head may go first, fairest tenants first, and whose adapters should stay.

        False where all may or none: nothing happens.
        """
        tenants = sorted(self._open, key=_Tenant.rank)
        ranked = [(tenant, recipe) for tenant in tenants for recipe in sorted(tenant.open, key=_Recipe.rank)]
        may = [may_go_first(recipe.waiting[0]) for _, recipe in ranked]
        if all(may) or not any(may):
            return False
        for (tenant, recipe), goes_first in zip(ranked, may, strict=True):
            if goes_first and limit > 0:
                limit -= 1
                tenant.loaded[recipe] = None
            else:
                tenant.park(recipe)
                self._withdraw(tenant, recipe)
        return True

    def parked(self, limit: int) -> list[Sequence]:
        """At most `limit` heads of parked recipes: tenants take turns, the least served first, each with its longest parked."""
        return self._heads(limit, lambda tenant: chain(tenant.returned, tenant.parked))

    def loaded(self, limit: int) -> list[Sequence]:
        """At most `limit` heads of recipes that were parked and are not: their adapters should stay until they start."""
        return self._heads(limit, lambda tenant: iter(tenant.loaded))

    def _heads(self, limit: int, recipes_of: Callable[[_Tenant], Iterator[_Recipe]]) -> list[Sequence]:
        tenants = heapq.nsmallest(
            limit,
            (tenant for tenant in self._tenants.values() if next(recipes_of(tenant), None) is not None),
            key=lambda tenant: tenant.counter,
        )
        heads: list[Sequence] = []
        turns = deque(map(recipes_of, tenants))
        while turns and len(heads) < limit:
            turn = turns.popleft()
            recipe = next(turn, None)
            if recipe is not None:
                heads.append(recipe.waiting[0])
                turns.append(turn)
        return heads

    # ---- inside

    def _enter(self, name: str) -> _Tenant:
        least = self._working.least()
        if least is None:
            # Nobody is present, so no one can be treated unfairly by starting everybody at zero again.
            self._away.clear()
        self._arrivals += 1
        counter = max(self._away.pop(name, 0.0), 0.0 if least is None else least.counter)
        tenant = _Tenant(name, counter, self._arrivals)
        self._tenants[name] = tenant
        self._working.add(tenant)
        return tenant

    def _find(self, key: FairKey) -> tuple[_Tenant, _Recipe]:
        tenant = self._tenants[key[0]]
        return tenant, tenant.recipes[key]

    def _count_waiting(self, tenant: _Tenant, change: int) -> None:
        tenant.waiting_count += change
        self._count += change

    def _offer(self, tenant: _Tenant, recipe: _Recipe) -> None:
        """The recipe may be next, unless it is parked."""
        if not tenant.is_parked(recipe) and recipe not in tenant.open:
            tenant.open.add(recipe)
            if tenant not in self._open:
                self._open.add(tenant)

    def _rerank(self, tenant: _Tenant) -> None:
        """It runs less than before: the one change that moves a tenant forward."""
        if tenant in self._open:
            self._open.add(tenant)

    def _withdraw(self, tenant: _Tenant, recipe: _Recipe) -> None:
        tenant.open.remove(recipe)
        if not tenant.open:
            self._open.remove(tenant)


def _forget(away: OrderedDict[Any, Any], limit: int) -> None:
    """Drop what was remembered longest."""
    while len(away) > limit:
        away.popitem(last=False)
