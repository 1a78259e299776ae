"""Who runs in the next step. Plain Python: no torch, no clock, no thread, so every rule here can be tested in microseconds.

A step has at most `max_batch_tokens` rows. They are given out in this order:
1. one row to every running sequence that draws a token;
2. a quarter of the rest to the prefill that arrived first, so that no stream of short prompts can starve a long one;
3. newly admitted sequences, fairest client first (`node.engine.admission`, `node.engine.fairness`);
4. unfinished prefills, those with the fewest chunks so far first: a long prompt delays another by at most one chunk.

When a running sequence needs a block and none is free, another one gives up all of its own (`node.engine.preemption`).

Planning may run one step ahead of the device: a plan may be made while the one before it is open, that is, not yet answered by
`complete`. Rows count as computed once they are planned, and a token that an open plan draws counts as pending: its row can be
planned (the runner knows the token as soon as the device does), its value is known when `complete` brings it. A sequence that
turns out to be finished is dropped from the open plan by ignoring its result. Its blocks may be given out at once, because the
device writes in the order of the plans; only blocks full of known tokens are ever offered to the prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from node.adapters.residency import AdapterMemory, Residency
from node.engine.admission import Admission
from node.engine.blocks import BlockPool, extend_keys, namespace_key
from node.engine.counters import Counters
from node.engine.draft import Draft
from node.engine.fairness import FairQueue
from node.engine.limits import SchedulerLimits
from node.engine.messages import SequenceEvent, Submit
from node.engine.preemption import Preemption
from node.engine.row_claims import RowClaims
from node.engine.running import Running
from node.engine.sequence import Sequence
from node.engine.spread import Spread
from node.engine.step_plan import StepPlan, Work, WorkResult
from node.request import DrawnToken


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
        self._adapters = adapters
        self._base_id = base_id
        self._queue = FairQueue()
        self._running = Running(blocks, adapters, limits.place_count)
        self._preemption = Preemption(self._running, self._queue, blocks, self.counters)
        self._admission = Admission(
            self._running, self._queue, blocks, adapters, self._preemption, self.counters, retire=self._retire
        )
        self._claims = RowClaims(self._running, self._queue, limits.max_batch_tokens)
        self._spread = Spread(self._running, self._queue, limits.spread_sizes)
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0
        self._draft: Draft | None = None  # of the last plan
        self._open_count = 0  # plans with work that `complete` has not answered: 0 or 1 when `plan` is called

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        return len(self._running) > 0 or len(self._queue) > 0

    def waiting_adapters(self) -> tuple[str, ...]:
        """Adapters that waiting sequences name, each once."""
        return tuple(dict.fromkeys(term.adapter_id for sequence in self._queue for term in sequence.terms))

    # ---- arrivals

    def add(self, submit: Submit) -> SequenceEvent | None:
        """Queue a sequence; returns its only event when it can never run or the queue is full."""
        sequence = Sequence(submit, self._arrivals, namespace_key(submit.tenant, self._base_id, submit.terms))
        self._arrivals += 1
        if sequence.id in self._by_id:
            return sequence.error("engine_failed", f"sequence {sequence.id} is running already; ids must be unique")
        refusal = self._limits.refusal(sequence, self._blocks, len(self._queue))
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

    def _retire(self, sequence: Sequence) -> None:
        """A sequence is over, whether it ran or waited."""
        del self._by_id[sequence.id]
        if sequence in self._running:
            self._running.stop(sequence)
        else:
            self._queue.take(sequence)
        self._queue.leave(sequence)

    # ---- planning

    def plan(self) -> StepPlan:
        """Choose the rows of the next step. Every plan with work must be answered by `complete`, in order, one late at most.

        `look_ahead` follows, before or after the step is launched.
        """
        self._running.let_go_of_adapters()  # before the step begins: the steps they are needed for are launched
        self._adapters.begin_step()
        draft = Draft(self._running, self._queue, self._limits.max_batch_tokens)
        self._admission.recall(draft)
        draft.row_limits = self._claims.limits(self.counters.steps)
        self._plan_decodes(draft)
        decode_count = len(draft.plan.work)
        row_count = self._spread.limit(decode_count)
        if row_count is not None:
            draft.bound(row_count)
        self._plan_first_prefill(draft)
        self._plan_prompts(draft)
        if not draft.plan.work and draft.row_limits:
            draft.row_limits = {}  # nobody could use what the others left
            self._plan_prompts(draft)
        while not draft.plan.work and self._running and not self._open_count:
            # Only prefills run and none can grow: let the last one go, so that the first one can.
            self._preemption.preempt(self._running.last)
            self._plan_prefills(draft)
        if draft.plan.work:
            self._spread.note(draft.plan.row_count - decode_count)
        self._commit(draft.plan)
        self._draft = draft
        return draft.plan

    def look_ahead(self) -> None:
        """Fetch adapters for those that wait. Whoever's adapters cannot be loaded ends, by an event of the plan just made."""
        if self._draft is not None:
            self._admission.look_ahead(self._draft)
            self._draft = None

    def _commit(self, plan: StepPlan) -> None:
        """From here on the rows count as computed, and what they draw as pending."""
        for work in plan.work:
            work.sequence.computed_count += work.count
            work.sequence.pending_count += work.draws_token
        self._open_count += bool(plan.work)

    def _plan_decodes(self, draft: Draft) -> None:
        """Oldest first, so that a victim (latest arrived) never has work in this plan already."""
        for sequence in list(self._running):
            if sequence.remaining_count != 1 or sequence.is_ending:
                continue
            while sequence in self._running and not self._running.grow(sequence, 1):
                self._preemption.preempt(self._preemption.victim(sequence))
            if sequence in self._running:
                draft.give(sequence, 1)

    def _plan_first_prefill(self, draft: Draft) -> None:
        first = next((sequence for sequence in self._running if sequence.remaining_count > 1), None)
        if first is not None and first.chunk_count > 0:
            draft.give_chunk(first, draft.left() // 4)

    def _plan_prompts(self, draft: Draft) -> None:
        self._admission.admit(draft)
        self._plan_prefills(draft)

    def _plan_prefills(self, draft: Draft) -> None:
        planned = {work.sequence.id: index for index, work in enumerate(draft.plan.work)}
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
                draft.extend_chunk(planned[sequence.id])
            else:
                draft.give_chunk(sequence, draft.left())

    # ---- results

    def refuse(self, refused: Mapping[str, Residency]) -> list[SequenceEvent]:
        """End every sequence that names an adapter which was not what its hash says; returns the last events."""
        named = [(sequence, term.adapter_id) for sequence in self._by_id.values() for term in sequence.terms] if refused else []
        found = {sequence.id: (sequence, refused[name]) for sequence, name in named if name in refused}
        for sequence, _ in found.values():
            self._retire(sequence)
        return [sequence.error(why.code, why.message) for sequence, why in found.values()]

    def can_repeat(self, work: Work) -> bool:
        """Whether somebody still wants what this work computes, and its blocks and adapters are where they were."""
        sequence = work.sequence
        if self._by_id.get(sequence.id) is not sequence or work.epoch != sequence.epoch:
            return False
        return sequence.holds_adapters or self._adapters.holds(sequence.terms)

    def complete(self, plan: StepPlan, results: Seq[WorkResult]) -> list[SequenceEvent]:
        """Take over what a step computed; returns the events it caused, in plan order."""
        self._open_count -= 1
        self.counters.count_step(plan)
        events = [self._advance(work, result) for work, result in zip(plan.work, results, strict=True)]
        return [event for event in events if event is not None]

    def _advance(self, work: Work, result: WorkResult) -> SequenceEvent | None:
        sequence = work.sequence
        if self._by_id.get(sequence.id) is not sequence:
            return None  # it ended while this step ran
        sequence.pending_count -= work.draws_token
        if result.is_skipped:
            if work.epoch == sequence.epoch:
                self._preemption.preempt(sequence)
            return None
        if result.has_failed:
            self._retire(sequence)
            return sequence.error("engine_failed", "the engine failed to compute this sequence; the operator's log says why")
        for index, logprob in enumerate(result.prompt_logprobs):
            if work.start + index + 1 == len(sequence.prompt_logprobs) < sequence.prompt_count:
                sequence.prompt_logprobs.append(logprob)
        if work.epoch == sequence.epoch:
            self._publish(sequence, work.start + work.count)
        return self._end_or_append(sequence, result) if work.draws_token else None

    def _end_or_append(self, sequence: Sequence, result: WorkResult) -> SequenceEvent:
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
