"""Planning one step ahead of the device: the fake device knows a token at once, the scheduler hears of it one plan later."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters.residency import READY
from node.engine.blocks import BlockPool
from node.engine.limits import SchedulerLimits
from node.engine.messages import Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.request import AdapterTerm, DrawnToken, Sampling

STOP = 7


class Adapters:
    """Always ready; counts pins."""

    def __init__(self):
        self.pins = {}

    def begin_step(self):
        pass

    def holds(self, terms):
        return True

    def ensure(self, terms):
        return READY

    def pin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] = self.pins.get(term.adapter_id, 0) + 1

    def unpin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] -= 1
            assert self.pins[term.adapter_id] >= 0


def next_token(tokens):
    """A hash of all tokens before it, so that a wrong context shows at once."""
    return zlib.crc32(bytes(str(list(tokens)), "ascii")) % 30


class Device:
    """Keys and values by cache slot, as the tokens they came from; runs steps in the order they are launched."""

    def __init__(self, block_count, block_size):
        self.block_size = block_size
        self.cache = [[None] * block_size for _ in range(block_count)]
        self.drawn = {}  # the token each sequence drew in the step before

    def run(self, plan):
        """Compute a plan from the cache alone, as attention does; returns its results."""
        before, self.drawn = self.drawn, {}
        return [self._run(work, before) for work in plan.work]

    def _run(self, work, before):
        sequence = work.sequence
        for position in range(work.start, work.start + work.count):
            is_known = position < len(sequence.tokens)
            token = sequence.tokens[position] if is_known else before[sequence.id]
            block, offset = divmod(position, self.block_size)
            self.cache[sequence.blocks[block]][offset] = token
        if not work.draws_token:
            return WorkResult()
        seen = [token for block in sequence.blocks for token in self.cache[block]][: work.start + work.count]
        self.drawn[sequence.id] = next_token(seen)
        return WorkResult(DrawnToken(self.drawn[sequence.id]))


class LateBench:
    """A scheduler whose plans are completed `lag` plans after they were launched."""

    def __init__(self, lag, block_count=64, max_sequences=8, max_batch_tokens=16, prefix_cache=True):
        self.lag = lag
        self.blocks = BlockPool(block_count, 4, prefix_cache)
        self.adapters = Adapters()
        limits = SchedulerLimits(max_sequences, max_batch_tokens, 100, max_model_len=500, vocab_size=1000)
        self.scheduler = Scheduler(self.blocks, limits, self.adapters, base_id="base")
        self.device = Device(block_count, 4)
        self.open = []
        self.tokens = {}
        self.ends = {}

    def add(self, sequence_id, prompt, max_new_tokens=4, adapters=(), **sampling):
        terms = tuple(AdapterTerm(name, f"/{name}", 1.0) for name in adapters)
        self.record(
            [
                self.scheduler.add(
                    Submit(
                        sequence_id=sequence_id,
                        tenant="t",
                        prompt_ids=tuple(prompt),
                        terms=terms,
                        sampling=Sampling(max_new_tokens=max_new_tokens, stop_token_ids=(STOP,), **sampling),
                    )
                )
            ]
        )

    def record(self, events):
        for event in filter(None, events):
            assert event.sequence_id not in self.ends, "an event after the last one"
            self.tokens.setdefault(event.sequence_id, []).extend(token.token_id for token in event.tokens)
            if event.finish_reason is not None:
                self.ends[event.sequence_id] = event.finish_reason

    def cancel(self, sequence_id):
        self.record([self.scheduler.cancel(sequence_id)])

    def step(self):
        plan = self.scheduler.plan()
        self.scheduler.look_ahead()
        self.record(plan.events)
        if plan.work:
            self.open.append((plan, self.device.run(plan)))
        while self.open and (len(self.open) > self.lag or not plan.work):
            self.record(self.scheduler.complete(*self.open.pop(0)))

    def run(self, limit=3000):
        for _ in range(limit):
            if not self.scheduler.has_work and not self.open:
                return
            self.step()
        raise AssertionError("the scheduler did not finish")


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


def test_decode_is_planned_before_its_token_is_known():
    bench = LateBench(lag=1)
    bench.add("a", range(5), max_new_tokens=3)
    first, second = bench.scheduler.plan(), bench.scheduler.plan()
    assert [(work.start, work.count, work.draws_token) for work in (*first.work, *second.work)] == [(0, 5, True), (5, 1, True)]


def test_sequence_whose_last_token_is_being_drawn_gets_no_row():
    bench = LateBench(lag=1)
    bench.add("a", range(5), max_new_tokens=1)
    assert bench.scheduler.plan().work
    assert not bench.scheduler.plan().work
    assert bench.scheduler.running_count == 1


def test_row_behind_a_stop_token_is_ignored_and_its_blocks_come_back():
    prompt = next(list(range(n)) for n in range(1, 200) if next_token(range(n)) == STOP)[:200]
    bench = LateBench(lag=1)
    bench.add("a", prompt, max_new_tokens=50)
    bench.run()
    assert bench.tokens["a"] == [STOP]
    assert bench.ends["a"] == "stop"
    assert bench.blocks.used_count == 0


def test_prefix_cache_never_holds_a_token_nobody_knows():
    bench = LateBench(lag=1)
    bench.add("a", range(3), max_new_tokens=9)
    published = []
    bench.blocks.publish = lambda block, key: published.append(bench.scheduler._by_id["a"].token_count)
    for _ in range(2):
        bench.step()  # the row of position 3 fills the block and its token is known only one step later
    assert published == []
    bench.step()
    assert len(published) == 1


def test_cancel_between_launch_and_result_frees_everything():
    bench = LateBench(lag=1)
    bench.add("a", range(9), max_new_tokens=50, adapters=("x",))
    for _ in range(3):
        bench.step()
    bench.cancel("a")
    assert bench.blocks.used_count == 0
    assert bench.adapters.pins == {"x": 0}
    bench.run()
    assert bench.ends == {"a": "cancelled"}


def test_adapters_are_let_go_while_the_last_token_is_drawn():
    bench = LateBench(lag=1)
    bench.add("a", range(3), max_new_tokens=3, adapters=("x",))
    bench.add("b", range(3), max_new_tokens=9)
    for _ in range(3):
        bench.step()
    assert bench.adapters.pins == {"x": 1}
    plan = bench.scheduler.plan()
    assert bench.adapters.pins == {"x": 0}
    assert [work.sequence.id for work in plan.work] == ["b"]
    assert "a" not in bench.ends
    bench.open.append((plan, bench.device.run(plan)))
    bench.run()
    assert bench.tokens["a"] == expected(range(3), 3)
    assert bench.adapters.pins == {"x": 0}


def test_preempted_sequence_waits_for_its_pending_token():
    bench = LateBench(lag=1, block_count=8)
    for index in range(3):
        bench.add(f"s{index}", [index] * 10, max_new_tokens=15)
    bench.run()
    assert bench.scheduler.counters.preemptions > 0
    for index in range(3):
        assert bench.tokens[f"s{index}"] == expected([index] * 10, 15)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12), st.sampled_from(["", "x", "xy"]), st.integers(0, 3)), max_size=12),
    st.integers(8, 20),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.data(),
)
def test_any_order_of_ends_gives_the_same_tokens_and_leaks_nothing(asks, block_count, max_sequences, prefix_cache, lag, data):
    bench = LateBench(lag, block_count, max_sequences, prefix_cache=prefix_cache)
    for index, (prompt_count, new_count, adapters, wait) in enumerate(asks):
        bench.add(f"s{index}", range(prompt_count), max_new_tokens=new_count, adapters=tuple(adapters))
        for _ in range(wait):
            bench.step()
        if data.draw(st.integers(0, 4)) == 0:
            bench.cancel(f"s{data.draw(st.integers(0, index))}")
    bench.run()
    for index, (prompt_count, new_count, _, _) in enumerate(asks):
        whole = expected(range(prompt_count), new_count)
        found = bench.tokens.get(f"s{index}", [])
        assert found == (whole[: len(found)] if bench.ends[f"s{index}"] == "cancelled" else whole)
    assert bench.blocks.used_count == 0
    assert not any(bench.adapters.pins.values())
    assert not bench.scheduler.has_work


@pytest.mark.parametrize("lag", [0, 1])
def test_failed_work_ends_its_sequence_once(lag):
    bench = LateBench(lag)
    bench.add("bad", range(3))
    bench.add("good", range(4))
    if lag:
        bench.step()
    plan = bench.scheduler.plan()
    results = [
        WorkResult(has_failed=True) if w.sequence.id == "bad" else r
        for w, r in zip(plan.work, bench.device.run(plan), strict=True)
    ]
    bench.open.append((plan, results))
    bench.run()
    assert bench.ends == {"bad": "error", "good": "length"}
    assert bench.tokens["good"] == expected(range(4), 4)
