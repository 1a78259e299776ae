"""What part of the running places and KV blocks each tenant holds, against its fair part.

Counters alone decide who is admitted next; they cannot help a tenant that arrives when another one's long answers hold every
place. So places and blocks are lent: a tenant alone may hold all of them, and gives back what is above its part when somebody
below theirs waits. What was computed stays in the prefix cache for as long as blocks last, so giving back seldom costs a whole
prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from node.engine.sequence import Sequence


@dataclass(slots=True)
class _Holding:
    """Places and blocks of one tenant's running sequences."""

    places: int = 0
    blocks: int = 0


class Shares:
    """A picture of one moment.

    Args:
        running: Sequences that run.
        weights: Of every tenant that runs or waits.
        place_count, block_count: What there is to share.
    """

    def __init__(self, running: Seq[Sequence], weights: Mapping[str, int], place_count: int, block_count: int) -> None:
        self._weights = weights
        self._total = max(1, sum(weights.values()))
        self._place_count = place_count
        self._block_count = block_count
        self._holdings = {name: _Holding() for name in weights}
        for sequence in running:
            holding = self._holdings[sequence.tenant]
            holding.places += 1
            holding.blocks += len(sequence.blocks)

    def allows(self, tenant: str, blocks: int) -> bool:
        """Whether one more sequence with `blocks` KV blocks leaves the tenant within its part. One place is always its own."""
        holding = self._holdings[tenant]
        if not holding.places:
            return True
        return holding.places < self._places(tenant) and holding.blocks + blocks <= self._blocks(tenant)

    def victim(self, among: Seq[Sequence]) -> Sequence | None:
        """The latest arrival of the tenant furthest above its part; None where nobody in `among` is above it.

        Args:
            among: In order of arrival.
        """
        excess = {name: self._excess(name) for name in {sequence.tenant for sequence in among}}
        furthest = max(excess, key=lambda name: (excess[name], name), default=None)
        if furthest is None or excess[furthest] <= 1:
            return None
        return next(sequence for sequence in reversed(among) if sequence.tenant == furthest)

    def is_above(self, tenant: str) -> bool:
        """Whether the tenant holds more than its part."""
        return self._excess(tenant) > 1

    def _excess(self, tenant: str) -> float:
        """Above 1 while the tenant would keep its part if it gave one place back."""
        holding = self._holdings[tenant]
        if holding.places < 2:
            return 0.0
        return max(holding.places / self._places(tenant), holding.blocks / self._blocks(tenant))

    def _places(self, tenant: str) -> int:
        return max(1, self._place_count * self._weights[tenant] // self._total)

    def _blocks(self, tenant: str) -> int:
        return max(1, self._block_count * self._weights[tenant] // self._total)
