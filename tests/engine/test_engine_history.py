"""The engine one step ahead of a device on which parts of steps fail: everybody gets the answer of a quiet day."""

import importlib.util
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from node.adapters.residency import LOADING, READY
from node.engine.blocks import BlockPool
from node.engine.engine import Engine
from node.engine.limits import SchedulerLimits
from node.engine.messages import Submit
from node.engine.scheduler import Scheduler
from node.engine.step_plan import WorkResult
from node.request import AdapterTerm, DrawnToken, Sampling

_spec = importlib.util.spec_from_file_location("quiet_day", Path(__file__).with_name("quiet_day.py"))
quiet_day = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(quiet_day)
STOP, expected, next_token = quiet_day.STOP, quiet_day.expected, quiet_day.next_token
BLOCK_SIZE = 4


class Adapters:
    """A few places, each taken one plan before its adapter is there. A step that names one too early is computed with another."""

    has_wishes = has_trials = False

    def __init__(self, place_count):
        self.place_count, self.here, self.coming, self.pins, self.wanted = place_count, {}, {}, {}, set()

    def begin_step(self):
        self.wanted = set()
        self.here |= self.coming
        self.coming = {}

    def grant_wishes(self):
        pass

    def holds(self, terms):
        return all(term.adapter_id in self.here for term in terms)

    def ensure(self, terms):
        names = {term.adapter_id for term in terms}
        self.wanted |= names
        for name in sorted(names - self.here.keys() - self.coming.keys()):
            if len(self.here) + len(self.coming) == self.place_count:
                idle = [other for other in self.here if not self.pins.get(other) and other not in self.wanted]
                if not idle:
                    continue
                del self.here[idle[0]]
            self.coming[name] = None
        return READY if self.holds(terms) else LOADING

    def pin(self, terms):
        assert self.holds(terms)
        for term in terms:
            self.pins[term.adapter_id] = self.pins.get(term.adapter_id, 0) + 1

    def unpin(self, terms):
        for term in terms:
            self.pins[term.adapter_id] -= 1
            assert self.pins[term.adapter_id] >= 0

    def named_as(self, term):
        """Who answers to a slot: nobody raises, one on its way is not itself yet."""
        if term.adapter_id in self.coming:
            return AdapterTerm("noise", "/noise", 1.0)
        if term.adapter_id not in self.here:
            raise KeyError(term.adapter_id)
        return term


class Device:
    """A cache of tokens. `faults`: which of its launches, draws and collects raise, what is repeated left out."""

    is_ahead = True

    def __init__(self, block_count, adapters, faults):
        self.cache = [[None] * BLOCK_SIZE for _ in range(block_count)]
        self.adapters, self.faults, self.calls, self.drawn = adapters, faults, 0, {}
        self.is_repeating = False

    def call(self):
        self.calls += not self.is_repeating
        if self.calls in self.faults and not self.is_repeating:
            raise RuntimeError("out of memory")

    def launch(self, work):
        before, self.drawn = self.drawn, {}
        self.call()
        return [(item, self.compute(item, before)) for item in work]

    def compute(self, work, before):
        sequence = work.sequence
        terms = [self.adapters.named_as(term) for term in sequence.terms]
        for position in range(work.start, work.start + work.count):
            if position >= len(sequence.tokens) and sequence.id not in before:
                raise ValueError("the token is neither known nor being drawn")
            token = sequence.tokens[position] if position < len(sequence.tokens) else before[sequence.id]
            block, offset = divmod(position, BLOCK_SIZE)
            self.cache[sequence.blocks[block]][offset] = token
        seen = [token for block in sequence.blocks for token in self.cache[block]][: work.start + work.count]
        return next_token(seen, terms)

    def draw(self, flight):
        self.call()
        self.drawn = {work.sequence.id: token for work, token in flight if work.draws_token}

    def collect(self, flight):
        self.call()
        return [WorkResult(DrawnToken(token)) if work.draws_token else WorkResult() for work, token in flight]


class Bench:
    def __init__(self, block_count, place_count, max_sequences, faults=()):
        self.blocks = BlockPool(block_count, BLOCK_SIZE)
        self.adapters = Adapters(place_count)
        limits = SchedulerLimits(max_sequences, 16, 100, max_model_len=500, vocab_size=1000)
        scheduler = self.scheduler = Scheduler(self.blocks, limits, self.adapters, base_id="base")
        device = self.device = Device(block_count, self.adapters, set(faults))
        self.engine = Engine(scheduler, device, self.adapters, self.blocks, quiet_day.Grammars(), None)
        compute_alone = self.engine._compute_alone

        def repeat(work):
            device.is_repeating = True
            results = compute_alone(work)
            device.is_repeating = False
            return results

        self.engine._compute_alone = repeat
        self.tokens, self.ends = {}, {}

    def add(self, name, tenant, prompt, count, terms):
        sampling = Sampling(max_new_tokens=count, stop_token_ids=(STOP,))
        submit = Submit(sequence_id=name, tenant=tenant, prompt_ids=tuple(prompt), terms=terms, sampling=sampling)
        self.record(self.engine.add(submit))

    def record(self, events):
        for event in events:
            assert event.sequence_id not in self.ends, "an event after the last one"
            self.tokens.setdefault(event.sequence_id, []).extend(token.token_id for token in event.tokens)
            if event.finish_reason is not None:
                self.ends[event.sequence_id] = event.finish_reason

    def step(self):
        self.record(self.engine.step()[0])

    def run(self):
        for _ in range(2000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine did not finish")


ASK = st.tuples(
    st.sampled_from("st"), st.integers(1, 24), st.integers(1, 9), st.lists(st.sampled_from("abcd"), max_size=2, unique=True)
)


@settings(max_examples=150, deadline=None)
@given(
    asks=st.lists(st.tuples(ASK, st.integers(0, 6)), min_size=1, max_size=12),
    block_count=st.integers(9, 24),
    place_count=st.integers(2, 4),
    max_sequences=st.integers(1, 5),
    faults=st.sets(st.integers(1, 60), max_size=12),
    cancels=st.dictionaries(st.integers(0, 11), st.integers(0, 30), max_size=3),
)
def test_faults_of_a_device_cost_time_and_nothing_else(asks, block_count, place_count, max_sequences, faults, cancels):
    bench = Bench(block_count, place_count, max_sequences, faults)
    wanted = {}
    for number, ((tenant, length, count, adapters), steps) in enumerate(asks):
        prompt, terms = [number] * length, tuple(AdapterTerm(adapter, f"/{adapter}", 1.0) for adapter in adapters)
        wanted[str(number)] = expected(prompt, count, terms)
        bench.add(str(number), tenant, prompt, count, terms)
        for _ in range(steps):
            bench.step()
    cancelled = {str(number) for number in cancels if str(number) in wanted}
    for number, steps in cancels.items():
        for _ in range(steps):
            if bench.engine.has_work:
                bench.step()
        bench.record(bench.engine.cancel(str(number)))
    bench.run()
    assert bench.ends.keys() == wanted.keys()
    for name, tokens in wanted.items():
        if bench.ends[name] == "cancelled":
            assert name in cancelled
            assert bench.tokens[name] == tokens[: len(bench.tokens[name])]
        else:
            assert (bench.ends[name], bench.tokens[name]) == ("stop" if tokens[-1] == STOP else "length", tokens)
    assert bench.blocks.used_count == 0
    assert not any(bench.adapters.pins.values())
