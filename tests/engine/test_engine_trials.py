"""Sequences that are computed with an adapter whose hash is not known yet: nothing of them leaves before it is."""

import importlib.util
from pathlib import Path

import pytest

from node.adapters.residency import READY, Residency, ResidencyState
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
REFUSED = Residency(ResidencyState.FAILED, "adapter_digest_mismatch", "the files changed")


class Adapters:
    """All are here. `trial`: one whose hash is known when somebody waits for it; `is_sound`: what comes out."""

    has_wishes = False

    def __init__(self, log, trial, is_sound):
        self.log, self.trial, self.is_sound, self.refused, self.pins = log, trial, is_sound, {}, []

    @property
    def has_trials(self):
        return self.trial is not None or bool(self.refused)

    def settle(self, names):
        self.log.append("settle")
        if self.trial in names:
            self.refused = {} if self.is_sound else {self.trial: REFUSED}
            self.trial = None
        return self.refused

    def begin_step(self): ...

    def grant_wishes(self): ...

    def holds(self, terms):
        return True

    def ensure(self, terms):
        return next((self.refused[term.adapter_id] for term in terms if term.adapter_id in self.refused), READY)

    def pin(self, terms):
        self.pins += terms

    def unpin(self, terms):
        for term in terms:
            self.pins.remove(term)


class Device:
    """Every token is 5."""

    is_ahead = True

    def __init__(self, log):
        self.log = log

    def launch(self, work):
        self.log.append("launch")
        return work

    def draw(self, flight): ...

    def collect(self, flight):
        self.log.append("collect")
        return [WorkResult(DrawnToken(5) if item.draws_token else None) for item in flight]


class Bench:
    """An engine one step ahead, with adapter "a" on trial."""

    def __init__(self, is_sound):
        self.log, self.events = [], {}
        self.adapters = Adapters(self.log, "a", is_sound)
        self.blocks = BlockPool(32, 4, True)
        limits = SchedulerLimits(4, 64, 16, 64, 100)
        self.scheduler = Scheduler(self.blocks, limits, self.adapters, "base")
        self.engine = Engine(self.scheduler, Device(self.log), self.adapters, self.blocks, quiet_day.Grammars(), None)

    def add(self, name, *adapters, new=4):
        terms = tuple(AdapterTerm(adapter, f"/{adapter}", 1.0) for adapter in adapters)
        sampling = Sampling(max_new_tokens=new)
        submit = Submit(sequence_id=name, tenant="t", prompt_ids=tuple(range(1, 11)), terms=terms, sampling=sampling)
        self.record(self.engine.add(submit))

    def record(self, events):
        for event in events:
            self.events.setdefault(event.sequence_id, []).append(event)

    def step(self):
        self.record(self.engine.step()[0])

    def run(self):
        for _ in range(50):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine did not finish")

    def tokens(self, name):
        return [token.token_id for event in self.events[name] for token in event.tokens]


@pytest.mark.parametrize("new", [1, 2, 4])
def test_tokens_leave_once_the_hash_is_known(new):
    bench = Bench(is_sound=True)
    bench.add("s", "a", new=new)
    bench.step()
    assert bench.events == {}
    bench.run()
    assert bench.tokens("s") == [5] * new
    assert bench.log.index("settle") > bench.log.index("collect")
    assert bench.log.count("settle") == 1
    assert bench.adapters.pins == []


@pytest.mark.parametrize("new", [1, 2, 4])
def test_sequence_of_a_refused_adapter_ends_without_a_token(new):
    bench = Bench(is_sound=False)
    bench.add("s", "a", new=new)
    bench.run()
    (event,) = bench.events["s"]
    assert (event.finish_reason, event.error_code, event.error_message) == ("error", REFUSED.code, REFUSED.message)
    assert event.tokens == ()
    assert bench.blocks.used_count == 0
    assert bench.adapters.pins == []


def test_everybody_who_names_a_refused_adapter_ends_and_nobody_else():
    bench = Bench(is_sound=False)
    for name, adapters in {"s": ("a",), "other": ("b",), "both": ("b", "a"), "base": ()}.items():
        bench.add(name, *adapters)
    bench.add("waits", "a")  # there are four places
    bench.run()
    assert {name: events[-1].finish_reason for name, events in bench.events.items()} == {
        "s": "error", "other": "length", "both": "error", "base": "length", "waits": "error",
    }  # fmt: skip
    assert bench.tokens("other") == bench.tokens("base") == [5] * 4
    assert bench.tokens("s") == bench.tokens("both") == bench.tokens("waits") == []


def test_keys_and_values_of_a_refused_adapter_are_found_by_nobody():
    bench = Bench(is_sound=False)
    bench.add("s", "a")
    bench.run()
    bench.adapters.refused = {}  # loaded anew, from sound files
    for name in ("again", "cached"):
        bench.add(name, "a")
        bench.run()
    assert [bench.events[name][0].cached_prompt_tokens for name in ("again", "cached")] == [0, 8]


def test_steps_without_a_trial_wait_for_no_hash():
    bench = Bench(is_sound=False)
    bench.adapters.trial = None
    bench.add("s", "a")
    bench.run()
    assert "settle" not in bench.log
    assert bench.tokens("s") == [5] * 4
