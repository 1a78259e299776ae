"""The scheduler against a fake model whose next token is a hash of all tokens before it, so a wrong context shows at once."""

import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters.residency import LOADING, READY, Residency, ResidencyState
from node.engine.blocks import BlockPool
from node.engine.limits import SchedulerLimits
from node.engine.messages import Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.request import AdapterTerm, DrawnToken, Sampling


class FakeAdapters:
    """Ready unless told otherwise; counts pins."""

    def __init__(self):
        self.state = {}
        self.held = None
        self.pins = {}
        self.wanted = []

    def begin_step(self):
        self.wanted = []

    def holds(self, terms):
        return self.held is None or all(term.adapter_id in self.held for term in terms)

    def ensure(self, terms):
        self.wanted.extend(term.adapter_id for term in terms)
        return next((self.state[term.adapter_id] for term in terms if term.adapter_id in self.state), READY)

    def pin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] = self.pins.get(term.adapter_id, 0) + 1

    def unpin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] -= 1
            assert self.pins[term.adapter_id] >= 0


def next_token(tokens):
    return zlib.crc32(bytes(str(list(tokens)), "ascii")) % 1000


class Bench:
    """A scheduler, a fake model and a record of what happened."""

    def __init__(
        self,
        block_count=64,
        block_size=4,
        max_sequences=8,
        max_batch_tokens=16,
        queue_limit=100,
        prefix_cache=True,
        spread_sizes=(),
    ):
        self.blocks = BlockPool(block_count, block_size, prefix_cache)
        self.adapters = FakeAdapters()
        limits = SchedulerLimits(max_sequences, max_batch_tokens, queue_limit, 500, vocab_size=1000, spread_sizes=spread_sizes)
        self.scheduler = Scheduler(self.blocks, limits, self.adapters, base_id="base")
        self.plans = []
        self.tokens = {}
        self.events = {}

    def add(self, sequence_id, prompt, max_new_tokens=4, tenant="t", adapters=(), **sampling):
        terms = tuple(AdapterTerm(name, f"/{name}", 1.0) for name in adapters)
        event = self.scheduler.add(
            Submit(
                sequence_id=sequence_id,
                tenant=tenant,
                prompt_ids=tuple(prompt),
                terms=terms,
                sampling=Sampling(max_new_tokens=max_new_tokens, **sampling),
            )
        )
        if event is not None:
            self.record([event])
        return event

    def record(self, events):
        for event in events:
            self.events.setdefault(event.sequence_id, []).append(event)
            self.tokens.setdefault(event.sequence_id, []).extend(token.token_id for token in event.tokens)

    def step(self):
        plan = self.scheduler.plan()
        self.scheduler.look_ahead()
        self.plans.append([(work.sequence.id, work.start, work.count) for work in plan.work])
        assert plan.row_count == sum(work.count for work in plan.work) <= 16
        for work in plan.work:
            assert len(work.sequence.blocks) * self.blocks.block_size >= work.start + work.count
        self.record(plan.events)
        results = []
        for work in plan.work:
            logprobs = tuple(float(work.start + i) for i in range(work.count)) if work.wants_prompt_logprobs else ()
            drawn = DrawnToken(next_token(work.sequence.tokens)) if work.draws_token else None
            results.append(WorkResult(drawn, logprobs))
        self.record(self.scheduler.complete(plan, results))
        return plan

    def step_plan(self):
        self.step()
        return self.plans[-1]

    def run(self, limit=2000):
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler did not finish")

    def finish_reason(self, sequence_id):
        return self.events[sequence_id][-1].finish_reason


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_scheduler_import_brings_no_torch_and_no_numpy():
    code = "import sys, node.engine.scheduler; sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sequence_runs_to_its_length():
    bench = Bench()
    bench.add("a", range(5), max_new_tokens=3)
    bench.run()
    assert bench.tokens["a"] == expected(range(5), 3)
    assert bench.finish_reason("a") == "length"
    assert bench.blocks.used_count == 0


def test_sequence_with_stop_token_ends_with_it():
    bench = Bench()
    stop = expected(range(5), 2)[1]
    bench.add("a", range(5), max_new_tokens=9, stop_token_ids=(stop,))
    bench.run()
    assert bench.tokens["a"] == expected(range(5), 2)
    assert bench.finish_reason("a") == "stop"


def test_sequence_with_zero_new_tokens_ends_after_its_prompt():
    bench = Bench()
    bench.add("a", range(5), max_new_tokens=0, prompt_logprobs=True)
    bench.run()
    assert bench.tokens["a"] == []
    assert bench.events["a"][-1].prompt_logprobs == (None, 0.0, 1.0, 2.0, 3.0)


def test_one_step_holds_three_adapters():
    bench = Bench()
    for name in "xyz":
        bench.add(name, range(3), adapters=(name,))
    bench.run()
    assert bench.scheduler.counters.max_adapters_in_one_step == 3
    assert any(len(plan) == 3 and all(count == 1 for _, _, count in plan) for plan in bench.plans)


def test_long_prompt_is_chunked_and_delays_others_by_at_most_one_chunk():
    bench = Bench()
    bench.add("long", range(120), max_new_tokens=1)
    bench.step()
    bench.add("short", range(8), max_new_tokens=2)
    bench.step()
    assert bench.tokens["short"] == expected(range(8), 1)
    bench.run()
    chunks = [count for plan in bench.plans for name, _, count in plan if name == "long"]
    assert max(chunks) == 16
    assert len(chunks) >= 8
    assert bench.tokens["long"] == expected(range(120), 1)


def test_long_prompt_under_a_stream_of_short_ones_still_finishes():
    bench = Bench()
    bench.add("long", range(100), max_new_tokens=1)
    for index in range(200):
        bench.add(f"s{index}", [index] * 15, max_new_tokens=1, tenant=f"t{index}")
        bench.step()
        if "long" in bench.events:
            break
    assert bench.finish_reason("long") == "length"
    assert index <= 100 // 4 + 2


def test_running_sequence_gets_its_row_in_every_step_of_a_prefill():
    bench = Bench()
    bench.add("decoding", range(3), max_new_tokens=20)
    bench.step()
    bench.add("long", range(100), max_new_tokens=1)
    for _ in range(6):
        assert ("decoding", 1) in [(name, count) for name, _, count in bench.step_plan()]


def test_pool_too_small_preempts_the_latest_and_keeps_the_tokens():
    small, large = Bench(block_count=8), Bench(block_count=64)
    for bench in (small, large):
        for index in range(4):
            bench.add(f"s{index}", [index] * 5, max_new_tokens=15)
        bench.run()
    assert small.scheduler.counters.preemptions > 0
    assert large.scheduler.counters.preemptions == 0
    assert small.tokens == large.tokens
    assert small.blocks.used_count == 0


def test_preempted_sequence_reports_each_token_once():
    bench = Bench(block_count=8, prefix_cache=False)
    for index in range(4):
        bench.add(f"s{index}", [index] * 5, max_new_tokens=15)
    bench.run()
    for index in range(4):
        assert bench.tokens[f"s{index}"] == expected([index] * 5, 15)


def test_first_sequence_is_never_preempted():
    bench = Bench(block_count=8)
    for index in range(4):
        bench.add(f"s{index}", [index] * 5, max_new_tokens=15)
    steps = 0
    while "s0" not in bench.events or bench.finish_reason("s0") is None:
        bench.step()
        steps += 1
    assert sum(name == "s0" for plan in bench.plans for name, _, _ in plan) == steps == 15


def test_prefix_hit_is_counted_and_its_prefill_skipped():
    bench = Bench()
    bench.add("first", range(12), max_new_tokens=1)
    bench.run()
    bench.plans.clear()
    bench.add("second", range(12), max_new_tokens=1)
    bench.run()
    assert bench.plans[0] == [("second", 8, 4)]  # the last block is computed again: its last row draws the token
    assert bench.events["second"][0].cached_prompt_tokens == 8
    assert bench.scheduler.counters.cached_prompt_tokens == 8
    assert bench.tokens["second"] == bench.tokens["first"]


@pytest.mark.parametrize("change", [{"tenant": "u"}, {"adapters": ("x",)}, {"prompt_logprobs": True}])
def test_prefix_of_other_tenant_recipe_or_with_prompt_logprobs_is_not_hit(change):
    bench = Bench()
    bench.add("first", range(12), max_new_tokens=1)
    bench.run()
    bench.add("second", range(12), max_new_tokens=1, **change)
    bench.run()
    assert bench.events["second"][0].cached_prompt_tokens == 0


def test_second_turn_hits_the_first_answer():
    bench = Bench()
    bench.add("first", range(8), max_new_tokens=9)
    bench.run()
    bench.add("second", [*range(8), *bench.tokens["first"], 7], max_new_tokens=1)
    bench.run()
    assert bench.events["second"][0].cached_prompt_tokens == 16


def test_cancel_frees_blocks_and_unpins():
    bench = Bench()
    bench.add("a", range(10), max_new_tokens=50, adapters=("x",))
    bench.step()
    assert bench.blocks.used_count > 0
    assert bench.adapters.pins == {"x": 1}
    event = bench.scheduler.cancel("a")
    assert event.finish_reason == "cancelled"
    assert bench.blocks.used_count == 0
    assert bench.adapters.pins == {"x": 0}
    assert not bench.scheduler.has_work


def test_cancel_of_waiting_sequence_leaves_the_others():
    bench = Bench(max_sequences=1)
    bench.add("a", range(3))
    bench.add("b", range(4))
    bench.step()
    assert bench.scheduler.cancel("b").finish_reason == "cancelled"
    bench.run()
    assert bench.finish_reason("a") == "length"


def test_cancel_of_unknown_sequence_is_ignored():
    assert Bench().scheduler.cancel("nobody") is None


def test_cancel_all_ends_everything():
    bench = Bench(max_sequences=1)
    bench.add("a", range(3))
    bench.add("b", range(4))
    bench.step()
    assert {event.sequence_id for event in bench.scheduler.cancel_all()} == {"a", "b"}
    assert not bench.scheduler.has_work
    assert bench.blocks.used_count == 0


def test_adapter_that_loads_does_not_block_others():
    bench = Bench()
    bench.adapters.state["slow"] = LOADING
    bench.add("waits", range(3), adapters=("slow",))
    bench.add("runs", range(3), adapters=("fast",))
    for _ in range(5):
        bench.step()
    assert bench.finish_reason("runs") == "length"
    assert "waits" not in bench.events
    del bench.adapters.state["slow"]
    bench.run()
    assert bench.finish_reason("waits") == "length"


def test_adapters_of_waiting_sequences_are_prefetched_while_the_batch_is_full():
    bench = Bench(max_sequences=1)
    bench.add("runs", range(3), max_new_tokens=9)
    bench.step()
    bench.add("waits", range(3), adapters=("next",))
    bench.step()
    assert set(bench.adapters.wanted) == {"next"}


def test_nobody_runs_and_more_wait_than_places_adapters_that_are_here_go_first():
    bench = Bench(max_sequences=2)
    bench.adapters.held = {"here"}
    for index in range(4):
        bench.add(f"far{index}", range(3), adapters=(f"far{index}",))
    bench.add("near", range(3), adapters=("here",))
    assert bench.step_plan() == [("near", 0, 3)]
    assert set(bench.adapters.wanted) == {"here", "far0", "far1", "far2", "far3"}
    bench.run()
    assert all(bench.finish_reason(name) == "length" for name in ("near", "far0", "far1", "far2", "far3"))


def test_adapter_that_fails_after_it_was_passed_over_ends_its_sequence_once():
    bench = Bench(max_sequences=1)
    bench.adapters.held = {"here"}
    bench.add("first", range(3), max_new_tokens=1, adapters=("here",))
    bench.add("waits", range(3), max_new_tokens=1, adapters=("far",))
    bench.step()
    bench.add("next", range(3), max_new_tokens=1, adapters=("here",))
    bench.adapters.state["far"] = LOADING
    bench.step()
    bench.adapters.state["far"] = Residency(ResidencyState.FAILED, "adapter_corrupt", "the file is damaged")
    bench.run()
    assert [bench.finish_reason(name) for name in ("first", "next", "waits")] == ["length", "length", "error"]


def test_all_that_wait_could_start_they_start_in_order():
    bench = Bench(max_sequences=2)
    bench.adapters.held = {"here"}
    bench.add("far", range(3), adapters=("far",))
    bench.add("near", range(3), adapters=("here",))
    assert bench.step_plan() == [("far", 0, 3), ("near", 0, 3)]


def test_plan_wants_only_what_may_start_and_looking_ahead_the_rest():
    bench = Bench(max_sequences=1)
    for name in "abc":
        bench.add(name, range(3), adapters=(name,))
    bench.adapters.state["c"] = Residency(ResidencyState.FAILED, "adapter_corrupt", "the file is damaged")
    plan = bench.scheduler.plan()
    assert bench.adapters.wanted == ["a", "b"]
    assert not plan.events
    bench.scheduler.look_ahead()
    assert set(bench.adapters.wanted) == {"a", "b", "c"}
    assert [event.error_code for event in plan.events] == ["adapter_corrupt"]
    bench.scheduler.look_ahead()  # once a plan
    assert len(plan.events) == 1


def test_adapter_failure_gives_only_that_sequence_an_error():
    bench = Bench()
    bench.adapters.state["bad"] = Residency(ResidencyState.FAILED, "adapter_corrupt", "the file is damaged")
    bench.add("bad", range(3), adapters=("bad",))
    bench.add("good", range(3), adapters=("good",))
    bench.run()
    last = bench.events["bad"][-1]
    assert (last.finish_reason, last.error_code, last.error_message) == ("error", "adapter_corrupt", "the file is damaged")
    assert bench.finish_reason("good") == "length"


def test_non_finite_logits_fail_only_their_sequence():
    bench = Bench()
    bench.add("bad", range(3))
    bench.add("good", range(4))
    plan = bench.scheduler.plan()
    results = [WorkResult(None if work.sequence.id == "bad" else DrawnToken(1)) for work in plan.work]
    bench.record(bench.scheduler.complete(plan, results))
    assert bench.events["bad"][-1].error_code == "engine_failed"
    bench.run()
    assert bench.finish_reason("good") == "length"


def test_queue_over_its_limit_is_refused():
    bench = Bench(queue_limit=2)
    assert bench.add("a", [1]) is None
    assert bench.add("b", [1]) is None
    refusal = bench.add("c", [1])
    assert (refusal.finish_reason, refusal.error_code) == ("error", "queue_full")
    bench.run()
    assert bench.finish_reason("a") == bench.finish_reason("b") == "length"


@pytest.mark.parametrize(("prompt_count", "new_count", "part"), [(497, 4, "context is 500"), (30, 4, "KV blocks")])
def test_prompt_too_long_is_refused_with_both_numbers(prompt_count, new_count, part):
    bench = Bench(block_count=8 if part == "KV blocks" else 200)
    refusal = bench.add("a", range(prompt_count), max_new_tokens=new_count)
    assert refusal.error_code == "context_length_exceeded"
    assert part in refusal.error_message
    assert not bench.scheduler.has_work


def test_busy_tenant_does_not_starve_a_quiet_one():
    bench = Bench(max_sequences=2)
    for index in range(20):
        bench.add(f"busy{index}", [index] * 4, tenant="busy", max_new_tokens=8)
    for _ in range(3):
        bench.step()
    bench.add("quiet", range(4), tenant="quiet", max_new_tokens=8)
    while "quiet" not in bench.events or bench.finish_reason("quiet") is None:
        bench.step()
    finished = sum(bench.finish_reason(f"busy{i}") == "length" for i in range(20) if f"busy{i}" in bench.events)
    assert finished <= 4


def test_two_backlogged_clients_get_equal_service():
    bench = Bench(max_sequences=4)
    for index in range(30):
        bench.add(f"long{index}", [index] * 12, adapters=("x",), max_new_tokens=8)
        bench.add(f"short{index}", [index] * 2, adapters=("y",), max_new_tokens=2)
    while min(sum(s.fair_key[1][0][0] == name for s in bench.scheduler._queue) for name in "xy") > 0:
        bench.step()
    served = [bench.scheduler._queue.counter(("t", ((name, 1.0),)))[1] for name in "xy"]
    # The bound of the VTC paper: two backlogged clients differ by at most twice what one batch can hold.
    assert abs(served[0] - served[1]) <= 2 * 4 * (12 + 2 * 8)


def test_prompt_logprobs_survive_preemption():
    bench = Bench(block_count=8)
    for index in range(3):
        bench.add(f"s{index}", [index] * 10, max_new_tokens=15, prompt_logprobs=True)
    bench.run()
    assert bench.scheduler.counters.preemptions > 0
    for index in range(3):
        assert bench.events[f"s{index}"][0].prompt_logprobs == (None, *map(float, range(9)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.sampled_from("tuv"), st.sampled_from(["", "x", "xy"])), max_size=12
    ),
    st.integers(8, 20),
    st.integers(1, 8),
    st.booleans(),
    st.data(),
)
def test_any_work_gives_the_same_tokens_and_leaks_nothing(asks, block_count, max_sequences, prefix_cache, data):
    bench = Bench(block_count=block_count, max_sequences=max_sequences, prefix_cache=prefix_cache)
    cancelled = set()
    for index, (prompt_count, new_count, tenant, adapters) in enumerate(asks):
        bench.add(f"s{index}", range(prompt_count), max_new_tokens=new_count, tenant=tenant, adapters=tuple(adapters))
        if data.draw(st.booleans()):
            bench.step()
        if data.draw(st.integers(0, 5)) == 0 and bench.scheduler.cancel(f"s{index}") is not None:
            cancelled.add(f"s{index}")
    bench.run()
    for index, (prompt_count, new_count, _, _) in enumerate(asks):
        if f"s{index}" not in cancelled:
            assert bench.tokens[f"s{index}"] == expected(range(prompt_count), new_count)
    assert bench.blocks.used_count == 0
    assert not any(bench.adapters.pins.values())


def test_tenant_below_its_share_gets_a_place_from_one_above_at_once():
    bench = Bench(max_sequences=4)
    for index in range(20):
        bench.add(f"busy{index}", [index] * 3, tenant="busy", max_new_tokens=50)
    for _ in range(3):
        bench.step()
    for index in range(3):
        bench.add(f"quiet{index}", [90 + index] * 3, tenant="quiet", max_new_tokens=8)
    bench.step()
    bench.step()
    spoken = [name for name in bench.events if name.startswith("quiet")]
    assert spoken == ["quiet0", "quiet1"]  # half of four places, and no more while both wait
    bench.run()
    for index in range(20):
        assert bench.tokens[f"busy{index}"] == expected([index] * 3, 50)


def test_tenant_below_its_share_gets_blocks_from_one_above():
    bench = Bench(block_count=16, max_sequences=8, prefix_cache=False)
    for index in range(6):
        bench.add(f"busy{index}", [index] * 8, tenant="busy", max_new_tokens=40)
    for _ in range(8):
        bench.step()
    bench.add("quiet", range(12), tenant="quiet", max_new_tokens=2)
    bench.step()
    assert "quiet" in bench.events
    bench.run()
    assert bench.finish_reason("busy5") == "length"


def test_oldest_sequence_keeps_its_place_whoever_comes():
    bench = Bench(max_sequences=2)
    for index in range(4):
        bench.add(f"busy{index}", [index] * 3, tenant="busy", max_new_tokens=40)
    bench.step()
    for index in range(30):
        bench.add(f"quiet{index}", [index] * 3, tenant=f"quiet{index % 5}", max_new_tokens=3)
        bench.step()
    assert sum(name == "busy0" for plan in bench.plans for name, _, _ in plan) == len(bench.plans)


def test_ready_adapter_is_not_held_up_by_many_cold_ones_of_any_tenant():
    bench = Bench(max_sequences=4, queue_limit=1000)
    for index in range(200):
        bench.adapters.state[f"cold{index}"] = LOADING
        bench.add(f"c{index}", [1] * 3, adapters=(f"cold{index}",), tenant="storm")
    bench.step()
    bench.add("hot", range(3), adapters=("hot",), tenant="storm", max_new_tokens=1)
    bench.add("other", range(3), adapters=("cold0",), tenant="other", max_new_tokens=1)
    bench.step()
    assert bench.finish_reason("hot") == "length"
    bench.step()
    assert len(bench.adapters.wanted) <= 16
    assert "cold0" in bench.adapters.wanted
    del bench.adapters.state["cold0"]
    bench.step()
    assert bench.finish_reason("other") == "length"


def test_loaded_adapter_that_finds_no_rows_is_wanted_before_those_fetched_ahead():
    bench = Bench(max_sequences=4, queue_limit=1000)
    for index in range(20):
        bench.adapters.state[f"cold{index}"] = LOADING
        bench.add(f"c{index}", [1] * 40, adapters=(f"cold{index}",))
    bench.step()
    for index in (18, 19):  # prompts longer than a step: the second one finds no rows
        del bench.adapters.state[f"cold{index}"]
        bench.scheduler._queue.unpark(next(item for item in bench.scheduler._queue if item.id == f"c{index}"))
    bench.step()
    assert {name for plan in bench.plans for name, _, _ in plan} == {"c18"}
    bench.step()
    assert bench.adapters.wanted[0] == "cold19"


def test_busy_tenants_prompts_leave_rows_to_somebody_below_its_share():
    bench = Bench(max_sequences=8, block_count=200)
    for index in range(40):
        bench.add(f"busy{index}", [index] * 30, tenant="busy", max_new_tokens=3)
    for _ in range(20):
        bench.step()
    bench.add("quiet", range(24), tenant="quiet", max_new_tokens=1)
    steps = 0
    while "quiet" not in bench.events:
        bench.step()
        steps += 1
    assert steps <= 3  # of 16 rows each; alone on half the engine it takes as many
    bench.run()
    assert all(bench.finish_reason(f"busy{index}") == "length" for index in range(40))


def test_prompts_beside_decodes_are_spread_while_more_wait_than_there_are_places():
    def run(*sizes):
        bench = Bench(max_sequences=4, spread_sizes=sizes)
        bench.add("long", range(3), max_new_tokens=60)
        bench.step()
        for index in range(12):
            bench.add(f"s{index}", range(50 * index, 50 * index + 4), max_new_tokens=8)
        bench.run()
        started = [sum(start == 0 for _, start, _ in plan) for plan in bench.plans[1:]]
        return [count for count in started if count], bench.tokens

    filled, tokens = run()
    spread, same_tokens = run((9, 36))
    assert filled == [3, 3, 3, 3]
    assert max(spread) == 2
    assert sum(spread) == 12
    assert tokens == same_tokens
