"""The whole engine over adapter memory of a GPU, border included, on a machine without one: answers, and who waits for whom.

Whatever is asked, loaded, lent, preempted, cancelled, refused or fails, everybody gets the answer of a quiet day, and no two
accesses to the same bytes go without an order (`tests/adapters/test_device_order.py`).
"""

import importlib.util
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters import device_pages, device_tables, halves
from node.adapters.host_arena import HostArena
from node.adapters.loader import Failed, Filled, Placed
from node.adapters.pool import AdapterPool
from node.engine.blocks import BlockPool
from node.engine.border import Border
from node.engine.engine import Engine
from node.engine.limits import SchedulerLimits
from node.engine.messages import Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.errors import AdapterChangedError
from node.kernels.lora import SideTensors
from node.request import DrawnToken, Sampling


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


order = _load(Path(__file__).parents[1] / "adapters" / "test_device_order.py")
quiet_day = _load(Path(__file__).with_name("quiet_day.py"))
STOP, expected, next_token = quiet_day.STOP, quiet_day.expected, quiet_day.next_token
LAYOUT, RANKS, TERMS, places_of = order.LAYOUT, order.RANKS, order.TERMS, order.places_of
UNIT_BLOCKS, BLOCK_SIZE = 2, 4
BLOCK_ELEMENTS = -(-LAYOUT.page_elements // UNIT_BLOCKS)


class Loader(order.Loader):
    """An urgent adapter is placed at once and hashed calls later, or when somebody waits. `bad`: fills whose hash is wrong."""

    def __init__(self, order, bad):
        super().__init__(order)
        self.bad, self.fills, self.hashing = bad, 0, []

    @property
    def job_count(self):
        return len(self.hashing) + sum(not isinstance(outcome, Placed) for outcome in self.ended)

    def fill(self, plan, pages, *, is_urgent=False):
        for page in pages:
            self.order.do(order.HOST, writes=places_of(torch.from_numpy(page)))
        self.fills += 1
        side = None if plan.file.is_plain else SideTensors({0: torch.zeros(3)}, {}, None)
        is_bad = self.fills in self.bad
        outcome = Failed(plan.adapter_id, AdapterChangedError("changed")) if is_bad else Filled(plan, 0.0, side)
        if is_urgent and plan.file.is_plain:
            self.ended.append(Placed(plan))
            self.hashing.append((2 + self.fills % 5, outcome))
        else:
            self.ended.append(outcome)

    def outcomes(self, wait_s=0.0):
        self.hashing = [(left - 1, outcome) for left, outcome in self.hashing]
        is_waited_for = wait_s > 0 and not self.ended
        while self.hashing and (is_waited_for or self.hashing[0][0] <= 0):
            self.ended.append(self.hashing.pop(0)[1])
            is_waited_for = False
        return super().outcomes()


class Runner:
    """Reads and writes what a step does, in two halves. `faults`: which of its calls raise, what is repeated left out."""

    is_ahead = True

    def __init__(self, bench, faults):
        self.bench, self.faults, self.calls, self.is_repeating, self.drawn = bench, faults, 0, False, {}

    def call(self):
        self.calls += not self.is_repeating
        if self.calls in self.faults and not self.is_repeating:
            raise RuntimeError("out of memory")

    def launch(self, work):
        before, self.drawn = self.drawn, {}
        self.call()
        flight = [(item, self.compute(item, before)) for item in work]
        self.touch(work)
        event = self.bench.cuda.Event()
        event.record()
        return flight, event

    def compute(self, work, before):
        sequence, pool, cache = work.sequence, self.bench.pool, self.bench.cache
        for position in range(work.start, work.start + work.count):
            is_known = position < len(sequence.tokens)
            block, offset = divmod(position, BLOCK_SIZE)
            cache[sequence.blocks[block]][offset] = sequence.tokens[position] if is_known else before[sequence.id]
        for term in sequence.terms:
            slot, rank = pool.slot_of(term.adapter_id), RANKS[int(term.adapter_id, 16)]
            pages = [page for page in pool.tensors.slot_pages[slot].tolist() if page >= 0]
            assert pages == list(pool._residents._tier[term.adapter_id].pages[: LAYOUT.pages_for_rank(rank)])
            assert pool.layer_ranks[slot] == rank
        seen = [token for block in sequence.blocks for token in cache[block]][: work.start + work.count]
        return next_token(seen, sequence.terms)

    def touch(self, work):
        bench, tensors = self.bench, self.bench.pool.tensors
        slots = {bench.pool.slot_of(term.adapter_id) for item in work for term in item.sequence.terms}
        tables = [place for slot in slots for table in (tensors.ranks, tensors.scales) for place in places_of(table[:, slot])]
        sides = [place for slot in slots if slot in tensors.sides for place in places_of(tensors.sides[slot].gains[0])]
        pages = [tensors.pages[page] for slot in slots for page in tensors.slot_pages[slot].tolist() if page >= 0]
        blocks = {block for item in work for block in item.sequence.blocks}
        cache = [place for block in blocks for place in places_of(bench.blocks_of_array[block])]
        half, lane = LAYOUT.half(), bench.cuda.current.lane
        first = [place for page in pages for place in places_of(page[:half])]
        second = [place for page in pages for place in places_of(page[half : LAYOUT.page_elements])]
        bench.order.do(lane, [*tables, *sides, *first], cache)
        self.call()
        if slots:
            tensors.halfway()
        bench.order.do(lane, [*tables, *sides, *second], cache)

    def draw(self, flight):
        self.call()
        self.drawn = {work.sequence.id: token for work, token in flight[0] if work.draws_token}

    def collect(self, flight):
        while not flight[1].query():
            assert self.bench.advance(), "the device waits for itself"
        self.call()
        return [WorkResult(DrawnToken(token)) if work.draws_token else WorkResult() for work, token in flight[0]]


class Bench:
    def __init__(self, kv_units, page_units, host_pages, max_sequences, faults, bad):
        self.now_s, self.tokens, self.ends, self.errors = 0.0, {}, {}, {}
        self.order = order.Order()
        self.cuda = order.Cuda(self.order)
        array = torch.zeros((kv_units + page_units, BLOCK_ELEMENTS * UNIT_BLOCKS))
        self.blocks_of_array = array.view(-1, BLOCK_ELEMENTS)
        self.cache = [[None] * BLOCK_SIZE for _ in self.blocks_of_array]
        self.patches = [patch.object(module, "torch", order.Torch(self.cuda)) for module in (device_pages, device_tables, halves)]
        for one in self.patches:
            one.start()
        store = device_pages.CudaPages(LAYOUT, array, max_rank=12, compute=self.cuda.current, first_page=kv_units)
        host_bytes = host_pages * LAYOUT.page_elements * 4
        arena = HostArena(LAYOUT, torch.float32, memory_bytes=host_bytes, allocate=lambda n: torch.zeros(n, dtype=torch.uint8))
        self.pool = AdapterPool(LAYOUT, store, Loader(self.order, bad), arena, clock=lambda: self.now_s)
        self.blocks = BlockPool(kv_units * UNIT_BLOCKS, BLOCK_SIZE, capacity=len(self.cache))
        border = Border(self.blocks, self.pool, UNIT_BLOCKS)
        self.blocks.borrow_from(border.lend_blocks)
        self.pool.borrow_from(border.lend_pages)
        limits = SchedulerLimits(max_sequences, 16, 100, self.blocks.block_limit * BLOCK_SIZE, 1000)
        scheduler, runner = Scheduler(self.blocks, limits, self.pool, "base"), Runner(self, faults)
        self.engine = Engine(scheduler, runner, self.pool, self.blocks, quiet_day.Grammars(), None)
        self.engine._compute_alone = self.quietly(runner, self.engine._compute_alone)

    def quietly(self, runner, repeat):
        def repeated(work):
            runner.is_repeating = True
            results = repeat(work)
            runner.is_repeating = False
            return results

        return repeated

    def close(self):
        for one in self.patches:
            one.stop()

    def advance(self):
        """Let the device do a piece of every stream; False where all wait or are done."""
        moved = [self.order.advance(lane) for lane in range(1, len(self.order.known))]
        return any(moved)

    def ask(self, name, tenant, prompt, count, terms):
        sampling = Sampling(max_new_tokens=count, stop_token_ids=(STOP,))
        submit = Submit(sequence_id=name, tenant=tenant, prompt_ids=prompt, terms=terms, sampling=sampling)
        self.record(self.engine.add(submit))

    def record(self, events):
        for event in events:
            assert event.sequence_id not in self.ends, "an event after the last one"
            self.tokens.setdefault(event.sequence_id, []).extend(token.token_id for token in event.tokens)
            if event.finish_reason is not None:
                self.ends[event.sequence_id], self.errors[event.sequence_id] = event.finish_reason, event.error_code

    def step(self, moves=()):
        """moves: (stream, pieces) that the device does before."""
        self.now_s += 1.0
        for stream, pieces in moves:
            for _ in range(pieces):
                self.order.advance(1 + stream % (len(self.order.known) - 1))
        with order.Copies(self.order, self.cuda):
            self.record(self.engine.step()[0])

    def run(self):
        for turn in range(600):
            if not self.engine.has_work:
                break
            self.step([(stream, 50) for stream in range(6) if turn % 3])
        assert not self.engine.has_work, "somebody was never served"
        for _ in range(25):  # what nobody waits for any more comes to an end
            self.step([(stream, 500) for stream in range(6)])


MOVES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=4)
ASKS = st.tuples(
    st.sampled_from("st"),
    st.integers(1, 14),
    st.integers(1, 6),
    st.lists(st.sampled_from(range(len(RANKS))), max_size=2, unique=True),
    st.lists(MOVES, max_size=4),
    st.sampled_from(["", "", "prefetch", "evict"]),
    st.sampled_from(range(len(RANKS))),
)


@settings(max_examples=100, deadline=None)
@given(
    asks=st.lists(ASKS, min_size=1, max_size=12),
    kv_units=st.integers(5, 8),
    page_units=st.integers(3, 6),
    host_pages=st.integers(4, 8),
    max_sequences=st.integers(1, 4),
    faults=st.sets(st.integers(1, 60), max_size=4),
    cancels=st.dictionaries(st.integers(0, 11), st.integers(0, 20), max_size=2),
    bad=st.sets(st.integers(1, 8), max_size=4),
)
def test_everybody_gets_the_answer_of_a_quiet_day(asks, kv_units, page_units, host_pages, max_sequences, faults, cancels, bad):
    bench = Bench(kv_units, page_units, host_pages, max_sequences, faults, bad)
    try:
        wanted = {}
        for number, (tenant, length, count, adapters, steps, wish, other) in enumerate(asks):
            prompt, terms = (number,) * length, tuple(TERMS[index] for index in adapters)
            wanted[str(number)] = expected(prompt, count, terms)
            if wish == "prefetch":
                bench.engine.prefetch(TERMS[other])
            elif wish == "evict":
                bench.engine.evict(TERMS[other].adapter_id)
            bench.ask(str(number), tenant, prompt, count, terms)
            for moves in steps:
                bench.step(moves)
        for number, steps in cancels.items():
            for _ in range(steps):
                bench.step()
            bench.record(bench.engine.cancel(str(number)))
        bench.run()
    finally:
        bench.close()
    assert bench.ends.keys() == wanted.keys()
    for name, tokens in wanted.items():
        if bench.ends[name] == "error":
            assert bench.errors[name] in ("adapter_too_large", "adapter_digest_mismatch")
            assert bench.tokens[name] == []
        elif bench.ends[name] == "cancelled":
            assert int(name) in cancels
            assert bench.tokens[name] == tokens[: len(bench.tokens[name])]
        else:
            assert (bench.ends[name], bench.tokens[name]) == ("stop" if tokens[-1] == STOP else "length", tokens)
    assert bench.blocks.used_count == 0
    for tier in (bench.pool._residents._tier, bench.pool._route._arena._tier):
        assert not any(tier[adapter_id].pin_count for adapter_id in tier.ids)
