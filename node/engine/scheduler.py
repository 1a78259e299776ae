"""Who runs in the next step. Plain Python: no torch, no clock, no thread, so every rule here can be tested in microseconds.

A step has at most `max_batch_tokens` rows. They are given out in this order:
1. one row to every running sequence that draws a token;
2. a quarter of the rest to the prefill that arrived first, so that no stream of short prompts can starve a long one;
3. newly admitted sequences, fairest client first (`node.engine.fairness`);
4. unfinished prefills, those with the fewest chunks so far first: a long prompt delays another by at most one chunk.

When a running sequence needs a block and none is free, the latest sequence of a tenant that holds more than its share
(`node.engine.shares`), or else of all, gives up all of its own and waits again; its tokens stay, so it continues with the same
answer (recomputing moves fewer bytes than swapping keys and values). So does one that holds a place or blocks above its tenant's
share when a tenant below its own is next: a busy tenant may fill the engine, but not for longer than until somebody else comes.

Planning may run one step ahead of the device: a plan may be made while the one before it is open, that is, not yet answered by
`complete`. Rows count as computed once they are planned, and a token that an open plan draws counts as pending: its row can be
planned (the runner knows the token as soon as the device does), its value is known when `complete` brings it. A sequence that
turns out to be finished is dropped from the open plan by ignoring its result. Its blocks may be given out at once, because the
device writes in the order of the plans; only blocks full of known tokens are ever offered to the prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field

from node.adapters.residency import AdapterMemory, ResidencyState
from node.engine.blocks import BlockPool, extend_keys, namespace_key
from node.engine.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, FairQueue
from node.engine.messages import SequenceEvent, Submit
from node.engine.sequence import Sequence
from node.engine.shares import Shares
from node.request import DrawnToken

PROMPT_LOGPROB_ROWS = 64  # a row's logits take vocabulary x 4 bytes, so a chunk that wants all of them is kept small
ABSENT = ""  # stands for tenants that are expected back; no tenant has this name
ABSENT_PARTS = 4  # of the rows for prompts, where each tenant above its share has one: it bounds how long their step is
CLAIM_STEPS = 32  # for so long a tenant that had prompts to compute is expected back
PREFETCH_LIMIT = 16  # waiting recipes whose adapters are fetched ahead in one step


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds from the settings; see `EngineSettings`."""

    max_sequences: int
    max_batch_tokens: int
    queue_limit: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of one sequence in one step: tokens `start` .. `start + count - 1`, the last of which may still be being drawn.

    Attributes:
        draws_token: The last row's logits give the next token.
        wants_prompt_logprobs: The logits of every row are wanted.
        epoch: Of the sequence's blocks; another one means that they were taken away meanwhile.
    """

    sequence: Sequence
    start: int
    count: int
    draws_token: bool
    wants_prompt_logprobs: bool
    epoch: int

    @property
    def embeds(self) -> bool:
        """Whether the last row's hidden state is wanted."""
        return self.draws_token and self.sequence.submit.embeds

    @classmethod
    def of(cls, sequence: Sequence, start: int, count: int) -> Work:
        """The work of these rows, as things stand."""
        end, total = start + count, sequence.token_count
        wants_logprobs = sequence.wants_prompt_logprobs and start + 1 < sequence.prompt_count
        return cls(
            sequence,
            start,
            count,
            draws_token=end == total,
            wants_prompt_logprobs=wants_logprobs,
            epoch=sequence.epoch,
        )


@dataclass(slots=True)
class StepPlan:
    """The rows of one step, and what became of sequences that will not run at all."""

    work: list[Work] = field(default_factory=list)
    events: list[SequenceEvent] = field(default_factory=list)
    row_count: int = 0
    row_limits: dict[str, int] = field(default_factory=dict)  # what tenants above their share may still take for prompts


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a step computed for one `Work`.

    Attributes:
        drawn: The next token when the work draws one; None when it does not, or when the logits were not finite.
        prompt_logprobs: Log-probability of the token after each row, for works that want them.
        has_failed: Nothing could be computed for this work.
        embedding: Hidden state of the last row, float32 bytes, for works that embed.
    """

    drawn: DrawnToken | None = None
    prompt_logprobs: tuple[float, ...] = ()
    has_failed: bool = False
    embedding: bytes | None = None


@dataclass(slots=True)
class Counters:
    """What happened since the process started."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    max_adapters_in_one_step: int = 0
    last_step_adapters: tuple[str, ...] = ()


class Scheduler:
    """Turns arrivals into step plans, and step results into events.

    Args:
        blocks: The KV blocks; used by this scheduler alone.
        limits: Bounds.
        adapters: Adapter memory, asked through a small door.
        base_id: Content hash of the base model, part of every prefix-cache key.
    """

    def __init__(self, blocks: BlockPool, limits: SchedulerLimits, adapters: AdapterMemory, base_id: str) -> None:
        self.counters = Counters()
        self._blocks = blocks
        self._limits = limits
        # Every running sequence needs a row each step once it draws tokens.
        self._max_running = min(limits.max_sequences, limits.max_batch_tokens)
        self._adapters = adapters
        self._base_id = base_id
        self._queue = FairQueue()
        self._running: list[Sequence] = []  # in order of arrival
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0
        self._claims: dict[str, int] = {}  # tenants that had prompts to compute, and in which step last
        self._has_held_back = False
        self._open_count = 0  # plans with work that `complete` has not answered: 0 or 1 when `plan` is called

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._queue) > 0

    def waiting_adapters(self) -> tuple[str, ...]:
        """Adapters that waiting sequences name, each once."""
        return tuple(dict.fromkeys(term.adapter_id for sequence in self._queue for term in sequence.terms))

    # ---- arrivals

    def add(self, submit: Submit) -> SequenceEvent | None:
        """Queue a sequence; returns its only event when it can never run or the queue is full."""
        sequence = Sequence(submit, self._arrivals, namespace_key(submit.tenant, self._base_id, submit.terms))
        self._arrivals += 1
        refusal = self._refusal(sequence)
        if refusal is None:
            self._by_id[sequence.id] = sequence
            self._queue.join(sequence)
        return refusal

    def cancel(self, sequence_id: str) -> SequenceEvent | None:
        """Stop a sequence now; returns its last event, or None when it is not here."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            return None
        self._retire(sequence)
        return sequence.event(finish_reason="cancelled")

    def cancel_all(self) -> list[SequenceEvent]:
        """Stop everything; returns the last events."""
        return [event for event in map(self.cancel, list(self._by_id)) if event is not None]

    def _refusal(self, sequence: Sequence) -> SequenceEvent | None:
        limits, wanted = self._limits, sequence.prompt_count + sequence.sampling.max_new_tokens
        if sequence.id in self._by_id:
            return sequence.error("engine_failed", f"sequence {sequence.id} is running already; ids must be unique")
        if sequence.prompt_count == 0:
            return sequence.error("invalid_request", "the prompt has no tokens; at least 1 is needed")
        stranger = next((token_id for token_id in sequence.tokens if not 0 <= token_id < limits.vocab_size), None)
        if stranger is not None:
            return sequence.error(
                "invalid_request",
                f"the prompt has the token id {stranger}; the model's vocabulary is 0 to {limits.vocab_size - 1}",
            )
        if wanted > limits.max_model_len:
            return sequence.error(
                "context_length_exceeded",
                f"the prompt has {sequence.prompt_count} tokens and {sequence.sampling.max_new_tokens} more were asked for; "
                f"the model's context is {limits.max_model_len} tokens; shorten the prompt or ask for fewer",
            )
        # The last token drawn is never fed back, so it needs no block.
        block_count = self._blocks.blocks_for(max(wanted - 1, sequence.prompt_count))
        if block_count > self._blocks.block_limit:
            return sequence.error(
                "context_length_exceeded",
                f"{wanted} tokens need {block_count} KV blocks and the engine has {self._blocks.block_limit}; "
                "shorten the request or raise engine.kv_cache_bytes",
            )
        if len(self._queue) >= limits.queue_limit:
            return sequence.error(
                "queue_full", f"{len(self._queue)} sequences are waiting, the limit is {limits.queue_limit}; retry later"
            )
        return None

    # ---- planning

    def plan(self) -> StepPlan:
        """Choose the rows of the next step. Every plan with work must be answered by `complete`, in order, one late at most."""
        plan = StepPlan()
        self._adapters.begin_step()
        self._recall(plan)
        plan.row_limits = self._row_limits()
        self._plan_decodes(plan)
        self._plan_first_prefill(plan)
        self._admit(plan)
        self._plan_prefills(plan)
        if not plan.work and plan.row_limits:
            plan.row_limits = {}  # nobody could use what the others left
            self._admit(plan)
            self._plan_prefills(plan)
        while not plan.work and self._running and not self._open_count:
            # Only prefills run and none can grow: let the last one go, so that the first one can.
            self._preempt(self._running[-1])
            self._plan_prefills(plan)
        self._commit(plan)
        return plan

    def _commit(self, plan: StepPlan) -> None:
        """From here on the rows count as computed, and what they draw as pending."""
        for work in plan.work:
            work.sequence.computed_count += work.count
            work.sequence.pending_count += work.draws_token
        self._open_count += bool(plan.work)

    def _budget(self, plan: StepPlan, tenant: str = "") -> int:
        """Rows that are left, of the tenant's part where it has one."""
        left = self._limits.max_batch_tokens - plan.row_count
        return min(left, plan.row_limits.get(tenant, left))

    def _row_limits(self) -> dict[str, int]:
        """What tenants above their share of places may take of the rows for prompts while others want them, now or a moment ago.

        At most their part, and in every other step nothing, so that the first rows of somebody else do not share a step with
        their long prompts. What they leave is left: a step that somebody waits for is better short than full.
        """
        weights = self._queue.weights()
        claims = {sequence.tenant for sequence in self._running if sequence.remaining_count > 1} | self._queue.open_tenants
        self._claims.update(dict.fromkeys(claims, self.counters.steps))
        self._claims = {name: step for name, step in self._claims.items() if self.counters.steps - step < CLAIM_STEPS}
        if not claims or len(self._claims) < 2:
            return {}
        # Whoever comes back first waits for the end of a step as well as for rows: several parts are kept for them.
        expected = {ABSENT: ABSENT_PARTS} if len(self._claims) > len(claims) else {}
        shares = Shares(self._running, {**weights, **expected}, self._max_running, self._blocks.block_count)
        above = {name for name in claims if shares.is_above(name)}
        total = sum(weights[name] for name in claims) + sum(expected.values())
        self._has_held_back = not self._has_held_back and 0 < len(above) < len(claims)
        rows = 0 if self._has_held_back else self._limits.max_batch_tokens
        return {name: rows * weights[name] // total for name in above}

    def _plan_decodes(self, plan: StepPlan) -> None:
        """Oldest first, so that a victim (latest arrived) never has work in this plan already."""
        for sequence in list(self._running):
            if sequence.remaining_count != 1 or sequence.is_ending:
                continue
            while sequence in self._running and not self._grow(sequence, 1):
                self._preempt(self._victim(sequence))
            if sequence in self._running:
                self._give(plan, sequence, 1)

    def _plan_first_prefill(self, plan: StepPlan) -> None:
        first = next((sequence for sequence in self._running if sequence.remaining_count > 1), None)
        if first is not None and first.chunk_count > 0:
            self._give_chunk(plan, first, self._budget(plan) // 4)

    def _plan_prefills(self, plan: StepPlan) -> None:
        planned = {work.sequence.id: index for index, work in enumerate(plan.work)}
        unfinished = [
            sequence
            for sequence in self._running
            if not sequence.is_ending and (sequence.remaining_count > 1 or sequence.id not in planned)
        ]
        unfinished.sort(
            key=lambda sequence: (sequence.chunk_count, self._queue.counter(sequence.fair_key), sequence.arrival_index)
        )
        for sequence in unfinished:
            if sequence.id in planned:
                self._extend_chunk(plan, planned[sequence.id])
            else:
                self._give_chunk(plan, sequence, self._budget(plan))

    def _give_chunk(self, plan: StepPlan, sequence: Sequence, limit: int) -> None:
        """Plan as many prefill rows as the limit, the sequence and the free blocks allow; none is a possible answer."""
        count = min(limit, self._budget(plan, sequence.tenant), self._chunk_limit(sequence))
        count = min(count, self._room(sequence))
        if count > 0 and self._grow(sequence, count):
            sequence.chunk_count += 1
            self._give(plan, sequence, count)

    def _extend_chunk(self, plan: StepPlan, index: int) -> None:
        """Give what is left of the step to a sequence that has a share of it."""
        work = plan.work[index]
        left = self._budget(plan, work.sequence.tenant)
        total = min(work.count + left, self._chunk_limit(work.sequence), self._room(work.sequence))
        if total > work.count and self._grow(work.sequence, total):
            plan.work[index] = Work.of(work.sequence, work.start, total)
            self._account(plan, work.sequence, total - work.count, PROMPT_TOKEN_COST)

    def _chunk_limit(self, sequence: Sequence) -> int:
        remaining = sequence.remaining_count
        return min(remaining, PROMPT_LOGPROB_ROWS) if sequence.wants_prompt_logprobs else remaining

    def _room(self, sequence: Sequence) -> int:
        """Rows that fit into the sequence's own blocks and all free ones."""
        return (len(sequence.blocks) + self._blocks.free_count) * self._blocks.block_size - sequence.computed_count

    def _give(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        is_decode = sequence.token_count > sequence.prompt_count and sequence.remaining_count == 1
        cost = OUTPUT_TOKEN_COST if is_decode else PROMPT_TOKEN_COST
        plan.work.append(Work.of(sequence, sequence.computed_count, count))
        self._account(plan, sequence, count, cost)

    def _account(self, plan: StepPlan, sequence: Sequence, count: int, cost: int) -> None:
        plan.row_count += count
        if sequence.tenant in plan.row_limits:
            plan.row_limits[sequence.tenant] = max(0, plan.row_limits[sequence.tenant] - count)
        self._queue.charge(sequence.fair_key, count * cost)

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Hold enough blocks for `count` more rows; takes none when there are not enough."""
        missing = self._blocks.blocks_for(sequence.computed_count + count) - len(sequence.blocks)
        if not self._blocks.reserve(missing):
            return False
        for _ in range(missing):
            block = self._blocks.allocate()
            if block is None:
                raise RuntimeError("the block pool counted a free block it does not have")
            sequence.blocks.append(block)
        return True

    # ---- admission

    def _admit(self, plan: StepPlan) -> None:
        """Move waiting sequences to the running ones, fairest first; one that waits for an adapter holds up nobody."""
        is_open, looks = True, 0
        with closing(self._queue.in_order()) as walk:
            for sequence in walk:
                if not self._is_ready(plan, sequence):
                    continue
                # Once one is refused for want of rows or blocks nobody may overtake it; the rest of the walk only prefetches.
                # A preempted one waits for the token that an open plan draws for it.
                # One whose tenant has had its part of the rows stands back for others.
                if self._budget(plan) and not self._budget(plan, sequence.tenant):
                    continue
                is_open = is_open and self._has_place(plan) and not sequence.pending_count and self._start(plan, sequence)
                looks += not is_open
                if looks >= PREFETCH_LIMIT:
                    return

    def _is_ready(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Whether its adapters are loaded. One whose adapters are on their way is parked, one whose adapters are bad ends."""
        residency = self._adapters.ensure(sequence.terms)
        if residency.state is ResidencyState.FAILED:
            self._retire(sequence)
            plan.events.append(sequence.error(residency.code, residency.message))
        elif residency.state is ResidencyState.LOADING:
            self._queue.park(sequence)
        return residency.state is ResidencyState.READY

    def _recall(self, plan: StepPlan) -> None:
        """Bring back sequences whose adapters are loaded by now, and make room for a tenant below its share.

        A sequence that finds no place or no blocks, of a tenant that holds less than its part, gets them from a tenant that holds
        more. It happens before anything is planned, so that nothing planned is taken back.
        """
        for sequence in self._queue.parked(PREFETCH_LIMIT):
            if self._is_ready(plan, sequence):
                self._queue.unpark(sequence)
        weights = self._queue.weights()
        if len(weights) < 2:
            return
        while (first := self._queue.first()) is not None and not self._is_ready(plan, first):
            pass
        while first is not None and not first.pending_count and not self._has_room(first):
            victim = self._debtor(first, weights)
            if victim is None:
                return
            self._preempt(victim)

    def _debtor(self, sequence: Sequence, weights: Mapping[str, int]) -> Sequence | None:
        """Who gives back its place for `sequence`, which is the next to be admitted, if that is within its tenant's part.

        Nobody whose tenant comes before it in the order: that tenant would only take its place again. And never the oldest,
        whoever it belongs to: somebody always gets to the end.
        """
        shares = Shares(self._running, weights, self._max_running, self._blocks.block_count)
        if not shares.allows(sequence.tenant, self._blocks_of(sequence)):
            return None
        counter = self._queue.counter(sequence.fair_key)[0]
        return shares.victim([other for other in self._running[1:] if self._queue.counter(other.fair_key)[0] >= counter])

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether it could run now, prefix hits aside."""
        free_count = self._blocks.free_count - self._owed_blocks()
        return len(self._running) < self._max_running and self._blocks_of(sequence) <= free_count

    def _blocks_of(self, sequence: Sequence) -> int:
        return self._blocks.blocks_for(len(sequence.tokens))

    def _victim(self, sequence: Sequence) -> Sequence:
        """Who gives up its blocks for `sequence`: the latest of a tenant above its share, else of all. None of those before
        `sequence` may, which have rows in this plan; the oldest of all never does."""
        later = self._running[max(1, self._running.index(sequence)) :]
        shares = Shares(self._running, self._queue.weights(), self._max_running, self._blocks.block_count)
        return shares.victim(later) or self._running[-1]

    def _has_place(self, plan: StepPlan) -> bool:
        return len(self._running) < self._max_running and self._budget(plan) > 0

    def _start(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Admit a sequence whose adapters are ready, if blocks for all of its tokens are left beside what prefills need."""
        matched = self._match(sequence)
        idle_count = sum(not self._blocks.is_held(block) for block in matched)
        needed = self._blocks.blocks_for(len(sequence.tokens)) - len(matched) + idle_count
        if not self._blocks.reserve(needed + self._owed_blocks()):
            return False
        self._queue.take(sequence)
        self._adapters.pin(sequence.terms)
        self._blocks.share(matched)
        sequence.blocks.extend(matched)
        sequence.published_count = len(matched)
        sequence.computed_count = len(matched) * self._blocks.block_size
        if not sequence.is_admitted:
            sequence.is_admitted = True
            sequence.cached_count = sequence.computed_count
            self.counters.prompt_tokens += sequence.prompt_count
            self.counters.cached_prompt_tokens += sequence.cached_count
        self._insert_running(sequence)
        self._give_chunk(plan, sequence, self._budget(plan))
        return True

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix; at least one token is left to compute, because its logits are needed."""
        extend_keys(sequence.keys, sequence.namespace, sequence.tokens, self._blocks.block_size, len(sequence.tokens))
        if sequence.wants_prompt_logprobs:
            return []
        return self._blocks.match(sequence.keys[: (len(sequence.tokens) - 1) // self._blocks.block_size])

    def _owed_blocks(self) -> int:
        """Blocks that running prefills were promised and do not hold yet."""
        return sum(
            self._blocks.blocks_for(sequence.token_count) - len(sequence.blocks)
            for sequence in self._running
            if not sequence.is_ending
        )

    def _insert_running(self, sequence: Sequence) -> None:
        """Keep the order of arrival; a preempted sequence comes back to its old place."""
        index = len(self._running)
        while index and self._running[index - 1].arrival_index > sequence.arrival_index:
            index -= 1
        self._running.insert(index, sequence)

    # ---- results

    def is_alive(self, work: Work) -> bool:
        """Whether anybody still wants what this work computes."""
        return self._by_id.get(work.sequence.id) is work.sequence and work.epoch == work.sequence.epoch

    def complete(self, plan: StepPlan, results: Seq[WorkResult]) -> list[SequenceEvent]:
        """Take over what a step computed; returns the events it caused, in plan order."""
        self._open_count -= 1
        self._count_step(plan)
        events = []
        for work, result in zip(plan.work, results, strict=True):
            event = self._advance(work, result)
            if event is not None:
                events.append(event)
        return events

    def _advance(self, work: Work, result: WorkResult) -> SequenceEvent | None:
        sequence = work.sequence
        if self._by_id.get(sequence.id) is not sequence:
            return None  # it ended while this step ran
        sequence.pending_count -= work.draws_token
        if result.has_failed:
            self._retire(sequence)
            return sequence.error("engine_failed", "the engine failed to compute this sequence; the operator's log says why")
        for index, logprob in enumerate(result.prompt_logprobs):
            if work.start + index + 1 == len(sequence.prompt_logprobs) < sequence.prompt_count:
                sequence.prompt_logprobs.append(logprob)
        if work.epoch == sequence.epoch:
            self._publish(sequence, work.start + work.count)
        if not work.draws_token:
            return None
        if result.drawn is None:
            self._retire(sequence)
            return sequence.error(
                "engine_failed", "the model gave logits that are not finite numbers; try another adapter or weight"
            )
        if sequence.sampling.max_new_tokens == 0:
            self._retire(sequence)
            return sequence.event(finish_reason="length", embedding=result.embedding)
        return self._append(sequence, result.drawn)

    def _append(self, sequence: Sequence, drawn: DrawnToken) -> SequenceEvent:
        sequence.tokens.append(drawn.token_id)
        self.counters.output_tokens += 1
        reason = None
        if drawn.token_id in sequence.sampling.stop_token_ids:
            reason = "stop"
        elif sequence.output_count >= sequence.sampling.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._retire(sequence)
        return sequence.event((drawn,), reason)

    def _publish(self, sequence: Sequence, token_count: int) -> None:
        """Offer the blocks that `token_count` tokens, all known, have filled to the prefix cache."""
        full_count = token_count // self._blocks.block_size
        if full_count <= sequence.published_count:
            return
        extend_keys(sequence.keys, sequence.namespace, sequence.tokens, self._blocks.block_size, token_count)
        for index in range(sequence.published_count, full_count):
            self._blocks.publish(sequence.blocks[index], sequence.keys[index])
        sequence.published_count = full_count

    def _count_step(self, plan: StepPlan) -> None:
        decoding = [work.sequence for work in plan.work if work.draws_token and work.sequence.output_count]
        adapters = tuple(dict.fromkeys(term.adapter_id for sequence in decoding for term in sequence.terms))
        self.counters.steps += 1
        self.counters.last_step_adapters = adapters
        self.counters.max_adapters_in_one_step = max(self.counters.max_adapters_in_one_step, len(adapters))

    # ---- leaving

    def _preempt(self, sequence: Sequence) -> None:
        """Take back every block; the sequence waits again with the tokens it has."""
        self._stop_running(sequence)
        sequence.computed_count = 0
        sequence.published_count = 0
        sequence.chunk_count = 0
        sequence.epoch += 1
        self._queue.put_back(sequence)
        self.counters.preemptions += 1

    def _retire(self, sequence: Sequence) -> None:
        """A sequence is over, whether it ran or waited."""
        del self._by_id[sequence.id]
        if sequence in self._running:
            self._stop_running(sequence)
        else:
            self._queue.take(sequence)
        self._queue.leave(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.release(sequence.blocks)
        del sequence.blocks[:]
        self._adapters.unpin(sequence.terms)
