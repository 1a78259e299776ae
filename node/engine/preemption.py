"""Who gives back a place or blocks, and how: its tokens stay, so it continues with the same answer when it runs again.

Recomputing moves fewer bytes than swapping keys and values. Whoever is above its tenant's share goes first; a busy tenant may
fill the engine, but not for longer than until somebody else comes. The oldest never gives way: somebody gets to the end.
"""

from __future__ import annotations

from collections.abc import Mapping

from node.engine.blocks import BlockPool
from node.engine.counters import Counters
from node.engine.fairness import FairQueue
from node.engine.running import Running
from node.engine.sequence import Sequence


class Preemption:
    """Takes places and blocks back.

    Args:
        running: Who holds them. queue: where they wait again.
        blocks: The KV blocks. counters: counts preemptions.
    """

    def __init__(self, running: Running, queue: FairQueue, blocks: BlockPool, counters: Counters) -> None:
        self._running = running
        self._queue = queue
        self._blocks = blocks
        self._counters = counters

    def preempt(self, sequence: Sequence) -> None:
        """Take back every block; the sequence waits again with the tokens it has."""
        self._running.stop(sequence)
        sequence.computed_count = 0
        sequence.published_count = 0
        sequence.chunk_count = 0
        sequence.epoch += 1
        self._queue.put_back(sequence)
        self._counters.preemptions += 1

    def victim(self, sequence: Sequence) -> Sequence:
        """Who gives up its blocks for `sequence`, which runs: the latest of a tenant above its share, else of all. None of those
        before `sequence` may, which have rows in this plan."""
        shares = self._running.shares(self._queue.weights())
        return shares.victim(self._running.after(sequence)) or self._running.last

    def debtor(self, sequence: Sequence, weights: Mapping[str, int]) -> Sequence | None:
        """Who gives back its place for `sequence`, which is the next to be admitted, if that is within its tenant's part.

        Nobody whose tenant comes before it in the order: that tenant would only take its place again.
        """
        shares = self._running.shares(weights)
        if not shares.allows(sequence.tenant, self._blocks.blocks_for(len(sequence.tokens))):
            return None
        counter = self._queue.counter(sequence.fair_key)[0]
        later = [other for other in self._running.after() if self._queue.counter(other.fair_key)[0] >= counter]
        return shares.victim(later)
