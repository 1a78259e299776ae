"""The scheduler over memory whose border moves: everybody is served, with the tokens they would have had alone."""

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters.residency import LOADING, READY
from node.engine.blocks import BlockPool
from node.engine.border import Border
from node.engine.limits import SchedulerLimits
from node.engine.messages import Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.request import AdapterTerm, DrawnToken, Sampling

UNIT_BLOCKS, KV_UNITS, UNITS, BLOCK_SIZE = 2, 5, 8, 4


class Memory:
    """Adapters of one page each, loaded at once where a page is free: the pool's rules in a few lines."""

    def __init__(self):
        self.free, self.place, self.pins, self.wanted = list(range(KV_UNITS, UNITS)), {}, {}, set()
        self.lender = None

    def begin_step(self):
        self.wanted = set()

    def holds(self, terms):
        return all(term.adapter_id in self.place for term in terms)

    def ensure(self, terms):
        self.wanted |= {term.adapter_id for term in terms}
        for name in (term.adapter_id for term in terms):
            if name in self.place:
                self.place[name] = self.place.pop(name)
            elif self._has_page():
                self.place[name] = self.free.pop()
        return READY if all(term.adapter_id in self.place for term in terms) else LOADING

    def _has_page(self):
        if not self.free:
            self._evict()
        if not self.free:
            self.lender(1)
        return bool(self.free)

    def _evict(self):
        idle = [name for name in self.place if not self.pins.get(name) and name not in self.wanted]
        if idle:
            self.free.append(self.place.pop(idle[0]))

    def pin(self, terms):
        for term in terms:
            assert term.adapter_id in self.place
            self.pins[term.adapter_id] = self.pins.get(term.adapter_id, 0) + 1

    def unpin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] -= 1

    def take_page(self):
        if not self.free:
            self._evict()
        return self.free.pop() if self.free else None

    def add_page(self, page):
        self.free.append(page)


class Bench:
    def __init__(self):
        self.blocks = BlockPool(KV_UNITS * UNIT_BLOCKS, BLOCK_SIZE, capacity=UNITS * UNIT_BLOCKS)
        self.memory = Memory()
        self.border = Border(self.blocks, self.memory, UNIT_BLOCKS)
        self.blocks.borrow_from(self.border.lend_blocks)
        self.memory.lender = self.border.lend_pages
        self.scheduler = Scheduler(self.blocks, SchedulerLimits(6, 16, 100, 200, 1000), self.memory, base_id="base")
        self.tokens, self.reasons = {}, {}

    def add(self, name, prompt_count, new, adapters=()):
        terms = tuple(AdapterTerm(adapter, f"/{adapter}", 1.0) for adapter in adapters)
        prompt = tuple(zlib.crc32(f"{name}{i}".encode()) % 1000 for i in range(prompt_count))
        sampling = Sampling(max_new_tokens=new)
        submit = Submit(sequence_id=name, tenant="t", prompt_ids=prompt, terms=terms, sampling=sampling)
        return self.scheduler.add(submit)

    def step(self):
        plan = self.scheduler.plan()
        self.scheduler.look_ahead()
        results = []
        for work in plan.work:
            held = set(work.sequence.blocks)
            pages = {
                block for page in self.memory.place.values() for block in range(page * UNIT_BLOCKS, (page + 1) * UNIT_BLOCKS)
            }
            assert not held & pages
            results.append(WorkResult(DrawnToken(len(work.sequence.tokens)) if work.draws_token else None))
        for event in [*plan.events, *self.scheduler.complete(plan, results)]:
            self.tokens.setdefault(event.sequence_id, []).extend(token.token_id for token in event.tokens)
            self.reasons[event.sequence_id] = event.finish_reason

    def run(self, limit=600):
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("somebody was never served")


def test_idle_pages_become_blocks_before_anybody_is_preempted():
    bench = Bench()
    for index in range(3):
        bench.add(f"s{index}", 4, 11)
    bench.run()
    assert bench.border.moved_to_blocks_total > 0
    assert bench.scheduler.counters.preemptions == 0
    assert set(bench.reasons.values()) == {"length"}


def test_idle_blocks_become_pages_for_more_adapters_than_there_was_room_for():
    bench = Bench()
    for index in range(UNITS - KV_UNITS + 1):
        bench.add(f"s{index}", 2, 2, [f"a{index}"])
    bench.run()
    assert bench.border.moved_to_pages_total > 0
    assert set(bench.reasons.values()) == {"length"}


def test_one_sequence_may_take_the_blocks_there_were_at_first_and_no_more():
    bench = Bench()
    tokens = KV_UNITS * UNIT_BLOCKS * BLOCK_SIZE
    assert bench.add("fits", tokens - 2, 3) is None
    refusal = bench.add("too long", tokens, 2)
    assert refusal.error_code == "context_length_exceeded"
    bench.run()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 16), st.integers(1, 6), st.lists(st.sampled_from("abcde"), max_size=3, unique=True), st.integers(0, 6)
        ),
        min_size=1,
        max_size=14,
    )
)
def test_everybody_is_served_whatever_the_border_does(requests):
    bench = Bench()
    for index, (prompt, new, adapters, steps) in enumerate(requests):
        assert bench.add(f"s{index}", prompt, new, adapters) is None
        for _ in range(steps):
            if bench.scheduler.has_work:
                bench.step()
    bench.run()
    for index, (prompt, new, _, _) in enumerate(requests):
        assert bench.tokens[f"s{index}"] == list(range(prompt, prompt + new))
    assert bench.blocks.used_count == 0
    assert not any(bench.memory.pins.values())
