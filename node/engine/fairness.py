"""Who is next: fair queueing over (tenant, recipe) by virtual token counters.

Source: Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), the VTC scheduler that S-LoRA ships. Every client
has a counter of tokens served; the waiting client with the smallest counter goes next; a client that was away is lifted to the
smallest counter of those present, so that idling earns no credit. Nobody starves: whoever waits keeps its counter, others' grow.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator

from node.engine.sequence import FairKey, Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2  # the paper's weights: a decode row costs more time than a prefill row


class FairQueue:
    """Waiting sequences, grouped by client, first come first served inside a client.

    Args:
        remembered_limit: Counters kept for clients that are away; the ones away longest are forgotten first.
    """

    def __init__(self, remembered_limit: int = 4096) -> None:
        self._waiting: dict[FairKey, deque[Sequence]] = {}
        self._counters: dict[FairKey, int] = {}  # of clients present: waiting or running
        self._present: dict[FairKey, int] = {}  # sequences of a client, waiting or running
        self._away: OrderedDict[FairKey, int] = OrderedDict()
        self._remembered_limit = remembered_limit
        self._count = 0

    def __len__(self) -> int:
        """Sequences waiting."""
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._waiting.values():
            yield from queue

    def join(self, sequence: Sequence) -> None:
        """A new sequence arrives."""
        key = sequence.fair_key
        if key not in self._present:
            lowest = min(self._counters.values(), default=None)
            if lowest is None:
                # Nobody is present, so no one can be treated unfairly by starting everybody at zero again.
                self._away.clear()
                lowest = 0
            self._counters[key] = max(self._away.pop(key, 0), lowest)
            self._present[key] = 0
        self._present[key] += 1
        self._waiting.setdefault(key, deque()).append(sequence)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, before its client's others."""
        self._waiting.setdefault(sequence.fair_key, deque()).appendleft(sequence)
        self._count += 1

    def take(self, sequence: Sequence) -> None:
        """A waiting sequence stops waiting; it stays present until `leave`."""
        queue = self._waiting[sequence.fair_key]
        queue.remove(sequence)
        self._count -= 1
        if not queue:
            del self._waiting[sequence.fair_key]

    def leave(self, sequence: Sequence) -> None:
        """A sequence that no longer waits is finished."""
        key = sequence.fair_key
        self._present[key] -= 1
        if self._present[key] == 0:
            del self._present[key]
            self._away[key] = self._counters.pop(key)
            while len(self._away) > self._remembered_limit:
                self._away.popitem(last=False)

    def charge(self, key: FairKey, cost: int) -> None:
        """A present client was served `cost` weighted tokens."""
        self._counters[key] += cost

    def counter(self, key: FairKey) -> int:
        """Weighted tokens a present client was served, counted from its last lift."""
        return self._counters[key]

    def in_order(self) -> Iterator[Sequence]:
        """Yield waiting sequences, fairest first, following charges and removals made between two yields.

        After a yield, a client comes up again with its next sequence only if the caller took the yielded one.
        """
        heap = [(self._counters[key], queue[0].arrival_index, key) for key, queue in self._waiting.items()]
        heapq.heapify(heap)
        while heap:
            _, _, key = heapq.heappop(heap)
            head = self._waiting[key][0]
            yield head
            queue = self._waiting.get(key)
            if queue and queue[0] is not head:
                heapq.heappush(heap, (self._counters[key], queue[0].arrival_index, key))
