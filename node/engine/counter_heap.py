"""The least of many members whose counters only grow, in O(log n).

An entry may hold a counter that is too low, never one that is too high, so the top is corrected when it surfaces and everything
below it can stay wrong for as long as nobody asks. A counter that grows costs nothing until then.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

_Member = TypeVar("_Member", bound=Hashable)
_SLACK = 64  # dead entries that may lie about before the heap is rebuilt


class CounterHeap(Generic[_Member]):
    """A set with a cheapest member.

    Args:
        rank: What members are compared by; for a member inside it may only grow. `add` again where it shrank.
    """

    def __init__(self, rank: Callable[[_Member], Any]) -> None:
        self._rank = rank
        self._entries: list[tuple[Any, int, _Member]] = []
        self._tickets: dict[_Member, int] = {}
        self._issued = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, member: _Member) -> bool:
        return member in self._tickets

    def __iter__(self) -> Iterator[_Member]:
        """All members, in no order."""
        return iter(self._tickets)

    def add(self, member: _Member) -> None:
        """Put a member in, or look at its rank afresh."""
        self._issued += 1
        self._tickets[member] = self._issued
        heapq.heappush(self._entries, (self._rank(member), self._issued, member))
        if len(self._entries) > 2 * len(self._tickets) + _SLACK:
            self._entries = [entry for entry in self._entries if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._entries)

    def remove(self, member: _Member) -> None:
        """Take a member out; one that is not inside is ignored."""
        self._tickets.pop(member, None)

    def least(self) -> _Member | None:
        """The member of the lowest rank, the one longest inside among equals; None when empty."""
        while self._entries:
            rank, ticket, member = self._entries[0]
            if self._tickets.get(member) != ticket:
                heapq.heappop(self._entries)
                continue
            now = self._rank(member)
            if now == rank:
                return member
            heapq.heapreplace(self._entries, (now, ticket, member))
        return None
