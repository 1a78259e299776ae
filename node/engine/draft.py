"""A step while it is being planned: who has rows of it, and how many are left."""

from __future__ import annotations

from node.engine.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, FairQueue
from node.engine.running import Running
from node.engine.sequence import Sequence
from node.engine.step_plan import StepPlan, Work

PROMPT_LOGPROB_ROWS = 64  # a row's logits take vocabulary x 4 bytes, so a chunk that wants all of them is kept small


class Draft:
    """Gives out rows and charges whoever gets them.

    Args:
        running: Gives blocks for the rows. queue: keeps the accounts.
        row_count: Rows of the step.

    Attributes:
        row_limits: What tenants above their share may still take of them for prompts.
    """

    def __init__(self, running: Running, queue: FairQueue, row_count: int) -> None:
        self.plan = StepPlan()
        self.row_limits: dict[str, int] = {}
        self._running = running
        self._queue = queue
        self._row_count = row_count

    def bound(self, row_count: int) -> None:
        """Give out no more rows than these."""
        self._row_count = min(self._row_count, row_count)

    def left(self, tenant: str = "") -> int:
        """Rows that are left, of the tenant's part where it has one."""
        left = max(0, self._row_count - self.plan.row_count)
        return min(left, self.row_limits.get(tenant, left))

    def give(self, sequence: Sequence, count: int) -> None:
        """The next `count` rows of a sequence that holds the blocks for them."""
        is_decode = sequence.token_count > sequence.prompt_count and sequence.remaining_count == 1
        cost = OUTPUT_TOKEN_COST if is_decode else PROMPT_TOKEN_COST
        self.plan.work.append(Work.of(sequence, sequence.computed_count, count))
        self._account(sequence, count, cost)

    def give_chunk(self, sequence: Sequence, limit: int) -> None:
        """As many prefill rows as the limit, the sequence and the free blocks allow; none is a possible answer."""
        count = min(limit, self.left(sequence.tenant), _chunk_limit(sequence), self._running.room(sequence))
        if count > 0 and self._running.grow(sequence, count):
            sequence.chunk_count += 1
            self.give(sequence, count)

    def extend_chunk(self, index: int) -> None:
        """What is left of the step to a sequence that has a share of it already."""
        work = self.plan.work[index]
        sequence = work.sequence
        total = min(work.count + self.left(sequence.tenant), _chunk_limit(sequence), self._running.room(sequence))
        if total > work.count and self._running.grow(sequence, total):
            self.plan.work[index] = Work.of(sequence, work.start, total)
            self._account(sequence, total - work.count, PROMPT_TOKEN_COST)

    def _account(self, sequence: Sequence, count: int, cost: int) -> None:
        self.plan.row_count += count
        if sequence.tenant in self.row_limits:
            self.row_limits[sequence.tenant] = max(0, self.row_limits[sequence.tenant] - count)
        self._queue.charge(sequence.fair_key, count * cost)


def _chunk_limit(sequence: Sequence) -> int:
    remaining = sequence.remaining_count
    return min(remaining, PROMPT_LOGPROB_ROWS) if sequence.wants_prompt_logprobs else remaining
