"""Waiting sequences become running ones, fairest first; one that waits for an adapter holds up nobody."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice

from node.adapters.residency import AdapterMemory, ResidencyState
from node.engine.blocks import BlockPool, extend_keys
from node.engine.counters import Counters
from node.engine.draft import Draft
from node.engine.fairness import FairQueue
from node.engine.preemption import Preemption
from node.engine.running import Running
from node.engine.sequence import Sequence

PREFETCH_LIMIT = 16  # waiting recipes whose adapters are fetched ahead in one step


class Admission:
    """Decides who may start.

    Args:
        running, queue: From where to where. blocks: The KV blocks. adapters: adapter memory.
        preemption: Makes room for a tenant below its share.
        counters: Counts prompt tokens.
        retire: Called with a waiting sequence that can never run.
    """

    def __init__(
        self,
        running: Running,
        queue: FairQueue,
        blocks: BlockPool,
        adapters: AdapterMemory,
        preemption: Preemption,
        counters: Counters,
        retire: Callable[[Sequence], None],
    ) -> None:
        self._running = running
        self._queue = queue
        self._blocks = blocks
        self._adapters = adapters
        self._preemption = preemption
        self._counters = counters
        self._retire = retire
        self._favours_held = False

    def recall(self, draft: Draft) -> None:
        """Bring back sequences whose adapters are loaded by now, and make room for a tenant below its share.

        A sequence that finds no place or no blocks, of a tenant that holds less than its part, gets them from a tenant that holds
        more. It happens before anything is planned, so that nothing planned is taken back.
        """
        self._favours_held = self._favour_held()
        for sequence in self._queue.loaded(min(PREFETCH_LIMIT, self._running.free_places)):
            if self._has_room(sequence):  # where blocks are short, pages may become some
                self._adapters.ensure(sequence.terms)  # before those that are fetched ahead: they must not push these out
        if not self._favours_held:
            self._fetch_parked(draft)
        weights = self._queue.weights()
        if len(weights) < 2:
            return
        while (first := self._queue.first()) is not None and not self._is_ready(draft, first):
            pass
        while first is not None and not first.pending_count and not self._has_room(first):
            victim = self._preemption.debtor(first, weights)
            if victim is None:
                return
            self._preemption.preempt(victim)

    def _favour_held(self) -> bool:
        """Where nobody runs and not all can start, some whose adapters are here go first, and keep them.

        A step that names an adapter on its way waits for it: the first one would begin when the last of its adapters is there.
        """
        if len(self._running) or len(self._queue) <= self._running.free_places:
            return False
        return self._queue.favour(PREFETCH_LIMIT, lambda sequence: self._adapters.holds(sequence.terms))

    def admit(self, draft: Draft) -> None:
        """Start whoever is ready and finds rows, a place and blocks; nobody overtakes the first who does not find them."""
        with closing(self._ready(draft)) as walk:
            for sequence in walk:
                if not self._start(draft, sequence):
                    return

    def look_ahead(self, draft: Draft) -> None:
        """Want the adapters of those that could not start, and fetch what is missing."""
        if self._favours_held:
            self._fetch_parked(draft)
        with closing(self._ready(draft)) as walk:
            for _ in islice(walk, PREFETCH_LIMIT):
                pass

    def _fetch_parked(self, draft: Draft) -> None:
        for sequence in self._queue.parked(PREFETCH_LIMIT):
            if self._is_ready(draft, sequence):
                self._queue.unpark(sequence)

    def _ready(self, draft: Draft) -> Generator[Sequence, None, None]:
        """Yield whoever could start as far as its adapters and its tenant's part of the rows go, fairest first."""
        with closing(self._queue.in_order()) as walk:
            for sequence in walk:
                # One whose tenant has had its part of the rows stands back for others.
                if self._is_ready(draft, sequence) and (draft.left(sequence.tenant) or not draft.left()):
                    yield sequence

    def _is_ready(self, draft: Draft, sequence: Sequence) -> bool:
        """Whether its adapters are loaded. One whose adapters are on their way is parked, one whose adapters are bad ends."""
        residency = self._adapters.ensure(sequence.terms)
        if residency.state is ResidencyState.FAILED:
            self._retire(sequence)
            draft.plan.events.append(sequence.error(residency.code, residency.message))
        elif residency.state is ResidencyState.LOADING:
            self._queue.park(sequence)
        return residency.state is ResidencyState.READY

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether it could run now, prefix hits aside."""
        free_count = self._blocks.free_count - self._running.owed_blocks()
        return self._running.has_place and self._blocks.blocks_for(len(sequence.tokens)) <= free_count

    def _start(self, draft: Draft, sequence: Sequence) -> bool:
        """Admit a sequence whose adapters are ready, if blocks for all of its tokens are left beside what prefills need.

        A preempted one waits for the token that an open plan draws for it.
        """
        if not self._running.has_place or draft.left() <= 0 or sequence.pending_count:
            return False
        matched = self._match(sequence)
        idle_count = sum(not self._blocks.is_held(block) for block in matched)
        needed = self._blocks.blocks_for(len(sequence.tokens)) - len(matched) + idle_count
        if not self._blocks.reserve(needed + self._running.owed_blocks()):
            return False
        self._queue.take(sequence)
        self._running.start(sequence, matched)
        if not sequence.is_admitted:
            sequence.is_admitted = True
            sequence.cached_count = sequence.computed_count
            self._counters.prompt_tokens += sequence.prompt_count
            self._counters.cached_prompt_tokens += sequence.cached_count
        draft.give_chunk(sequence, draft.left())
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix; at least one token is left to compute, because its logits are needed."""
        extend_keys(sequence.keys, sequence.namespace, sequence.tokens, self._blocks.block_size, len(sequence.tokens))
        if sequence.wants_prompt_logprobs:
            return []
        return self._blocks.match(sequence.keys[: (len(sequence.tokens) - 1) // self._blocks.block_size])
