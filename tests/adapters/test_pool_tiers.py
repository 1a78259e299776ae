"""Adapter memory in two tiers against a device that runs behind: every interleaving of loader, copies, steps and requests.

The device here executes launched work late and in any order its streams allow. A step that finds another adapter's bytes in the
pages it was launched with has read memory that was given away too early.
"""

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.adapters.binding import Binding
from node.adapters.file_plan import PLACEMENT_RECORD, TENSOR_RECORD, FilePlan
from node.adapters.host_arena import HostArena
from node.adapters.loader import AdapterPlan, Failed, Filled, Inspected, Placed
from node.adapters.pool import AdapterPool
from node.adapters.residency import ResidencyState
from node.errors import AdapterChangedError
from node.kernels.layout import PageLayout
from node.kernels.lora import LoraPool
from node.request import AdapterTerm

LAYOUT = PageLayout([("m", 2, 3)], 4)
RANKS = (1, 4, 5, 8, 3, 12, 2)  # of adapter 0, 1, ...: one to three pages
TERMS = tuple(AdapterTerm(f"{index:064x}", f"/adapters/{index}", 1.0) for index in range(len(RANKS)))
DEVICE_PAGES, HOST_PAGES = 4, 5
OTHER = -1.0  # what somebody else keeps in a page that was lent


def content(adapter_id, page_index):
    return float(int(adapter_id, 16) * 8 + page_index + 1)


def file_plan(rank):
    return FilePlan(
        binding=Binding(()),
        is_plain=True,
        rank=rank,
        extent=LAYOUT.page_elements,
        side_bytes=0,
        tensors=np.zeros(0, TENSOR_RECORD),
        placements=np.zeros(0, PLACEMENT_RECORD),
        module_indices=np.array([0]),
        ranks=np.array([rank], np.int32),
        scales=np.array([1.0], np.float32),
        hash_parts=(b"",),
        hash_order=(),
    )


class Loader:
    """Jobs end when the test says so; an urgent one says first that its pages are complete."""

    job_limit = 3
    will_fail = False  # the job that somebody waits for

    def __init__(self):
        self.jobs = deque()
        self.ended = []
        self.doubtful = set()  # whose pages were complete before their hash, which never came or was another one

    @property
    def job_count(self):
        return len(self.jobs) + sum(not isinstance(outcome, Placed) for outcome in self.ended)

    def inspect(self, adapter_id, directory):
        assert self.job_count < self.job_limit
        self.jobs.append((adapter_id, directory, None, False))

    def fill(self, plan, pages, *, is_urgent=False):
        assert self.job_count < self.job_limit
        self.jobs.append((plan.adapter_id, plan.directory, pages, is_urgent))

    def end_one(self, has_failed=False):
        adapter_id, directory, pages, is_urgent = self.jobs.popleft()
        plan = AdapterPlan(adapter_id, directory, file_plan(RANKS[int(adapter_id, 16)]))
        if is_urgent:
            self.write(adapter_id, pages)
            self.jobs.appendleft((adapter_id, directory, pages, False))
            self.ended.append(Placed(plan))
            self.doubtful.add(adapter_id)
        elif has_failed:
            self.ended.append(Failed(adapter_id, AdapterChangedError("changed")))
        elif pages is None:
            self.ended.append(Inspected(plan))
        else:
            self.write(adapter_id, pages)
            self.ended.append(Filled(plan, 0.0))
            self.doubtful.discard(adapter_id)

    def write(self, adapter_id, pages):
        for index, page in enumerate(pages):
            page[:] = content(adapter_id, index)

    def outcomes(self, wait_s=0.0):
        if wait_s and not self.ended:
            self.end_one(self.will_fail)
        found, self.ended = self.ended, []
        return found

    def close(self):
        pass


class Arrival:
    early_share = None

    def __init__(self, device):
        self.device = device
        self.done = False

    def is_done(self):
        return self.done

    def join(self):
        self.device.compute.append(("wait", self))

    def seconds(self):
        return 1e-9


class Device:
    """Two streams whose work is done when the test says so."""

    def __init__(self):
        pages = torch.zeros((DEVICE_PAGES, LAYOUT.page_elements))
        slots = DEVICE_PAGES
        self.tensors = LoraPool(
            pages, torch.full((slots, 3), -1, dtype=torch.int32), torch.zeros((1, slots)), torch.zeros((1, slots)), 4
        )
        self.first_page = 0
        self.compute, self.copies = deque(), deque()
        self.marks, self.reached = 0, 0

    def begin_step(self):
        self.marks += 1
        self.compute.append(("mark", self.marks))

    def mark(self):
        return self.marks + 1

    foreign_mark = mark

    def hide(self, slot):
        self.tensors.slot_pages[slot] = -1

    def send(self, place, sources, file, side):
        arrival = Arrival(self)
        self.copies.append((min(place.fence, self.marks), place.pages, sources, arrival))
        self.tensors.slot_pages[place.slot, : len(sources)] = torch.tensor(place.pages, dtype=torch.int32)
        return arrival

    def launch(self, pool, adapter_ids):
        named = {name: self.tensors.slot_pages[pool.slot_of(name)].tolist() for name in adapter_ids}
        self.compute.append(("step", {name: [page for page in pages if page >= 0] for name, pages in named.items()}))

    def compute_one(self):
        """Do the oldest piece of the compute stream; False when it has to wait for a copy or there is none."""
        if not self.compute or (self.compute[0][0] == "wait" and not self.compute[0][1].done):
            return False
        kind, value = self.compute.popleft()
        if kind == "mark":
            self.reached = value
        elif kind == "write":
            self.tensors.pages[value] = OTHER
        elif kind == "read":
            assert torch.all(self.tensors.pages[value] == OTHER), "a copy overwrote what a launched step was to read"
        elif kind == "step":
            for adapter_id, pages in value.items():
                assert len(pages) == LAYOUT.pages_for_rank(RANKS[int(adapter_id, 16)])
                for index, page in enumerate(pages):
                    assert torch.all(self.tensors.pages[page] == content(adapter_id, index)), (
                        "a step read another adapter's bytes"
                    )
        return True

    def copy_one(self):
        if not self.copies or self.copies[0][0] > self.reached:
            return False
        _, pages, sources, arrival = self.copies.popleft()
        for page, source in zip(pages, sources, strict=True):
            self.tensors.pages[page].copy_(source)
        arrival.done = True
        return True


class Tiers(RuleBasedStateMachine):
    """Requests come, run for some steps one step ahead of the device, and end."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.loader, self.device = Loader(), Device()
        page_bytes = LAYOUT.page_elements * 4
        self.arena = HostArena(
            LAYOUT,
            torch.float32,
            memory_bytes=HOST_PAGES * page_bytes,
            allocate=lambda size: torch.zeros(size, dtype=torch.uint8),
        )
        self.pool = AdapterPool(LAYOUT, self.device, self.loader, self.arena, clock=lambda: self.now_s)
        self.waiting, self.running, self.ending, self.lent = [], [], [], []
        self.open = set()  # named by the step that is not taken over yet

    @precondition(lambda self: len(self.waiting) < 6)
    @rule(first=st.sampled_from(range(len(RANKS))), others=st.lists(st.sampled_from(range(len(RANKS))), max_size=1))
    def arrive(self, first, others):
        self.waiting.append(tuple(TERMS[index] for index in dict.fromkeys([first, *others])))

    @precondition(lambda self: self.loader.jobs)
    @rule(has_failed=st.sampled_from([False, False, False, True]))
    def end_job(self, has_failed):
        self.loader.end_one(has_failed)

    @rule()
    def compute(self):
        self.device.compute_one()

    @rule()
    def copy(self):
        self.device.copy_one()

    @rule(is_late=st.booleans(), end=st.integers(0, 3), is_first=st.booleans(), will_fail=st.booleans())
    def step(self, is_late, end, is_first=False, will_fail=False):
        """Plan and launch a step; then some running sequences turn out to be over, in this step or the one before.

        `is_first`: all but the first in line are looked at behind the launch.
        """
        self.now_s += 0.3
        self.pool.begin_step()
        if not is_late:
            self.finish()
        for terms in self.waiting[:1] if is_first else list(self.waiting):
            if self.look(terms) and len(self.running) < 3:
                self.waiting.remove(terms)
                self.pool.pin(terms)
                self.running.append(terms)
        # A sequence that ended is still in the step that was planned before anybody knew.
        self.device.launch(self.pool, named := {term.adapter_id for terms in [*self.running, *self.ending] for term in terms})
        for terms in list(self.waiting) if is_first else ():
            self.look(terms)
        self.loader.will_fail = will_fail
        self.open = named - self.land()
        if is_late:
            self.finish()
        self.ending, self.running = self.ending + self.running[:end], self.running[end:]

    def land(self):
        """Take over the step before; whoever ran on trial with what was refused ends. Returns those adapters."""
        refused = set(self.pool.settle(self.open)) if self.pool.has_trials else set()
        assert not (self.open - refused) & self.loader.doubtful, "a token left before the hash was known"
        for terms in [terms for terms in [*self.running, *self.ending] if any(term.adapter_id in refused for term in terms)]:
            self.pool.unpin(terms)
            (self.running if terms in self.running else self.ending).remove(terms)
        return refused

    def look(self, terms):
        """Want a recipe; whether it may run."""
        held = self.pool.holds(terms)
        answer = self.pool.ensure(terms)
        if answer.state is ResidencyState.FAILED:
            self.waiting.remove(terms)
        assert not held or answer.state is not ResidencyState.LOADING
        return answer.state is ResidencyState.READY

    @rule()
    def lend_a_page(self):
        page = self.pool.take_page()
        if page is not None:
            self.lent.append(page)
            self.device.compute.append(("write", page))

    @precondition(lambda self: self.lent)
    @rule()
    def take_a_page_back(self):
        page = self.lent.pop()
        self.device.compute.append(("read", page))
        self.pool.add_page(page)

    def finish(self):
        for terms in self.ending:
            self.pool.unpin(terms)
        self.ending = []

    @invariant()
    def no_page_has_two_owners_and_none_is_lost(self):
        for tier, lent in ((self.pool._residents._tier, self.lent), (self.arena._tier, [])):
            owned = [page for adapter_id in tier.ids for page in tier[adapter_id].pages]
            assert sorted([*owned, *tier._free_pages, *lent]) == list(range(tier.page_count + len(lent)))
            slots = [tier[adapter_id].slot for adapter_id in tier.ids]
            assert sorted([*slots, *tier._free_slots]) == list(range(tier.slot_count))

    @invariant()
    def ranks_of_slots_are_those_of_whoever_has_them(self):
        wanted = [0] * self.pool.slot_count
        for adapter_id in self.pool._residents._files:
            wanted[self.pool.slot_of(adapter_id)] = RANKS[int(adapter_id, 16)]
        assert self.pool.layer_ranks.tolist() == wanted

    @invariant()
    def whoever_runs_is_resident(self):
        named = {term.adapter_id for terms in [*self.running, *self.ending] for term in terms}
        assert named <= set(self.pool._residents._files)
        assert set(self.pool.resident_ids) == {name for name in self.pool._residents._files if self.pool._loading.is_proven(name)}

    @invariant()
    def tiers_are_told_apart(self):
        assert not set(self.pool.host_ids) & set(self.pool.resident_ids)
        assert self.pool.sent_bytes_total % (LAYOUT.page_elements * 4) == 0

    def teardown(self):
        """Whatever happened before: when everybody does their part, everybody gets their turn."""
        while self.lent:
            self.take_a_page_back()
        for _ in range(60):
            while self.loader.jobs:
                self.loader.end_one()
            self.step(is_late=True, end=3)
            while self.device.compute_one() or self.device.copy_one():
                pass
        assert not self.waiting
        assert not self.loader.jobs
        assert not self.arena._abandoned
        self.step(is_late=True, end=3)
        assert not any(self.pool._residents._tier[name].pin_count for name in self.pool._residents._tier.ids)
        assert not any(self.arena._tier[name].pin_count for name in self.arena._tier.ids)


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


class Bench:
    """A pool whose loader and device obey at once."""

    def __init__(self):
        machine = self.machine = Tiers()
        self.loader, self.device, self.arena, self.pool = machine.loader, machine.device, machine.arena, machine.pool

    def step(self, *recipes):
        self.pool.begin_step()
        return [self.pool.ensure(terms).state for terms in recipes]

    def stage(self, *terms):
        """Bring adapters as far as the arena."""
        for _ in range(2):
            self.step(terms)
            while self.loader.jobs:
                self.loader.end_one()
        self.pool.begin_step()


@pytest.fixture
def bench():
    return Bench()


def test_idle_engine_may_name_an_adapter_whose_copy_was_only_launched(bench):
    bench.stage(TERMS[0])
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]
    bench.pool.pin([TERMS[0]])
    kinds = [kind for kind, _ in bench.device.compute]
    assert kinds[-1] == "wait"


def test_adapter_is_held_once_its_last_byte_is_there(bench):
    bench.stage(TERMS[0])
    assert not bench.pool.holds([TERMS[0]])
    bench.step([TERMS[0]])
    assert not bench.pool.holds([TERMS[0]])
    bench.device.copy_one()
    bench.step()
    assert bench.pool.holds([TERMS[0]])
    assert not bench.pool.holds([TERMS[0], TERMS[1]])
    assert bench.pool.holds([])


def test_running_sequences_do_not_wait_for_anothers_copy(bench):
    bench.pool.pin([])  # a sequence without adapters runs
    bench.stage(TERMS[0])
    assert bench.step([TERMS[0]]) == [ResidencyState.LOADING]
    bench.device.copy_one()
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]
    bench.pool.pin([TERMS[0]])
    assert all(arrival.done for kind, arrival in bench.device.compute if kind == "wait")


def test_running_sequences_may_name_an_adapter_that_arrives_before_their_step_begins(bench):
    bench.pool.pin([])  # a sequence without adapters runs
    bench.stage(TERMS[0], TERMS[1])
    assert bench.step([TERMS[0]]) == [ResidencyState.LOADING]
    bench.device.copy_one()
    states = []
    for _ in range(6):  # steps are longer than a copy, which was seen now
        bench.machine.now_s += 1.0
        states = [*states, *bench.step([TERMS[1]] if len(states) > 3 else [TERMS[0]])]
    assert states[4:] == [ResidencyState.LOADING, ResidencyState.READY]
    bench.pool.pin([TERMS[1]])
    assert "wait" in [kind for kind, _ in bench.device.compute]


def test_adapter_that_left_the_device_comes_back_without_its_files(bench):
    bench.stage(TERMS[3])  # two pages
    bench.step([TERMS[3]])
    bench.device.copy_one()
    bench.stage(TERMS[5])  # three pages: the first one has to leave
    bench.step([TERMS[5]])
    assert bench.pool.host_ids == (TERMS[3].adapter_id,)
    assert bench.pool.evictions_total == 1
    while bench.device.compute_one() or bench.device.copy_one():
        pass
    loads = bench.pool.file_loads_total
    bench.step([TERMS[3]])
    assert bench.pool.resident_ids == (TERMS[3].adapter_id,)
    assert bench.pool.file_loads_total == loads
    assert bench.pool.loads_total == 3


def test_copy_waits_for_the_last_step_of_the_adapter_that_made_room(bench):
    bench.stage(TERMS[3])
    bench.stage(TERMS[5])
    bench.step([TERMS[3]])
    bench.device.copy_one()
    bench.step([TERMS[3]])
    bench.pool.pin([TERMS[3]])
    bench.device.launch(bench.pool, [TERMS[3].adapter_id])
    bench.pool.unpin([TERMS[3]])
    bench.step([TERMS[5]])
    assert TERMS[3].adapter_id not in bench.pool.resident_ids
    while bench.device.compute[0][0] != "step":
        bench.device.compute_one()
    assert not bench.device.copy_one()
    while bench.device.compute_one():
        pass
    assert bench.device.copy_one()


def test_arena_forgets_the_least_recently_used_and_counts_it(bench):
    for index in (0, 1, 2, 4):  # one, one, two and one page of five
        bench.stage(TERMS[index])
    bench.stage(TERMS[6])
    assert bench.pool.host_evictions_total == 1
    assert TERMS[0].adapter_id not in bench.arena.staged_ids
    assert TERMS[6].adapter_id in bench.arena.staged_ids


def test_waiting_adapters_are_staged_while_the_device_is_full(bench):
    bench.stage(TERMS[5])
    bench.step([TERMS[5]])
    bench.pool.pin([TERMS[5]])
    bench.device.copy_one()
    bench.stage(TERMS[3])
    assert bench.step([TERMS[3]]) == [ResidencyState.LOADING]
    assert bench.pool.host_ids == (TERMS[3].adapter_id,)
    bench.pool.unpin([TERMS[5]])
    bench.step([TERMS[3]])
    assert TERMS[3].adapter_id in bench.pool.resident_ids


def test_adapter_larger_than_the_arena_is_refused_with_its_setting():
    machine = Tiers()
    small = HostArena(
        LAYOUT, torch.float32, memory_bytes=LAYOUT.page_elements * 8, allocate=lambda size: torch.zeros(size, dtype=torch.uint8)
    )
    pool = AdapterPool(LAYOUT, machine.device, machine.loader, small)
    pool.begin_step()
    pool.ensure([TERMS[5]])
    machine.loader.end_one()
    pool.begin_step()
    answer = pool.ensure([TERMS[5]])
    assert answer.code == "adapter_too_large"
    assert "adapters.host_memory_bytes" in answer.message


def test_device_pages_without_an_arena_are_refused():
    machine = Tiers()
    with pytest.raises(ValueError, match="arena"):
        AdapterPool(LAYOUT, machine.device, machine.loader)


def test_plan_directory_is_looked_at_again_when_it_moves(bench):
    bench.step([TERMS[0]])
    bench.loader.end_one()
    moved = AdapterTerm(TERMS[0].adapter_id, "/elsewhere", 1.0)
    bench.step([moved])
    assert bench.loader.jobs[0][1] == Path("/elsewhere")


def test_no_more_bytes_are_sent_at_once_than_arrive_soon(monkeypatch):
    monkeypatch.setattr("node.adapters.arena_route.COPIES_BYTES", LAYOUT.page_elements * 4)
    tiers = Tiers()
    for _ in range(4):
        tiers.pool.begin_step()
        for wanted in TERMS[:3]:
            tiers.pool.ensure([wanted])
        while tiers.loader.jobs:
            tiers.loader.end_one(False)
    assert len(tiers.device.copies) == 1
    while tiers.device.compute_one() or tiers.device.copy_one():
        pass
    tiers.pool.begin_step()
    for wanted in TERMS[:3]:
        tiers.pool.ensure([wanted])
    assert len(tiers.device.copies) == 1


def test_recipe_whose_second_adapter_is_sent_when_the_first_has_come_is_known_to_wait_for_copies(bench):
    """Nobody runs, so no step's end makes the engine look again."""
    recipe = (TERMS[0], TERMS[1])
    bench.stage(*recipe)
    bench.pool._route._copies._byte_s.append(1.0)  # far more than any step
    assert bench.step(recipe) == [ResidencyState.LOADING]
    assert bench.pool.is_copying
    while bench.device.compute_one() or bench.device.copy_one():
        pass
    assert bench.step(recipe) == [ResidencyState.READY]


# ---- trials


def place(bench, terms):
    """Bring an adapter so far that its pages are complete and its hash is not known."""
    bench.step(terms)
    bench.loader.end_one()
    bench.step(terms)
    bench.loader.end_one()


def refuse(bench):
    bench.loader.end_one(has_failed=True)


def test_adapter_is_named_before_its_hash_is_known_where_nobody_runs(bench):
    place(bench, [TERMS[0]])
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]
    assert not bench.pool.holds([TERMS[0]])
    assert bench.pool.resident_ids == bench.pool.host_ids == ()
    assert bench.pool.has_trials
    bench.loader.end_one()
    assert bench.pool.settle([TERMS[0].adapter_id]) == {}
    assert not bench.pool.has_trials
    assert bench.pool.resident_ids == (TERMS[0].adapter_id,)
    assert bench.arena.staged_ids == (TERMS[0].adapter_id,)


def test_adapter_waits_for_its_hash_where_somebody_runs(bench):
    bench.pool.pin([])
    place(bench, [TERMS[0]])
    bench.pool.unpin([])
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]  # it was not urgent, so its hash came with its pages
    place(bench, [TERMS[1]])
    bench.pool.pin([TERMS[0]])
    assert bench.step([TERMS[1]]) == [ResidencyState.LOADING]
    assert len(bench.device.copies) == 1


def test_second_sequence_waits_for_the_hash_that_the_first_one_runs_beside(bench):
    place(bench, [TERMS[0]])
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]
    bench.pool.pin([TERMS[0]])
    assert bench.step([TERMS[0]], []) == [ResidencyState.LOADING, ResidencyState.READY]
    bench.loader.end_one()
    bench.device.copy_one()
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]


def test_settling_waits_for_the_hash_of_adapters_that_the_step_names_alone(bench):
    place(bench, [TERMS[0]])
    bench.step([TERMS[0]])
    assert bench.pool.settle([TERMS[1].adapter_id]) == {}
    assert bench.loader.jobs
    bench.pool.settle([TERMS[0].adapter_id])
    assert not bench.loader.jobs


def test_adapter_refused_on_trial_is_let_near_nobody_and_leaves(bench):
    place(bench, [TERMS[0]])
    bench.step([TERMS[0]])
    bench.pool.pin([TERMS[0]])
    bench.device.launch(bench.pool, [TERMS[0].adapter_id])
    refuse(bench)
    assert bench.step([TERMS[0]]) == [ResidencyState.FAILED]
    bench.machine.now_s += 10.0  # the loader would try again
    assert bench.step([TERMS[0]]) == [ResidencyState.FAILED]
    refused = bench.pool.settle([TERMS[0].adapter_id])
    assert {name: answer.code for name, answer in refused.items()} == {TERMS[0].adapter_id: "adapter_digest_mismatch"}
    assert bench.pool.resident_ids == ()
    bench.pool.unpin([TERMS[0]])
    bench.step()
    assert bench.pool.has_trials  # the copy still reads the arena
    assert bench.arena.claim(TERMS[0].adapter_id, 1, ()) is None
    while bench.device.compute_one() or bench.device.copy_one():
        pass
    bench.step()
    assert not bench.pool.has_trials
    assert bench.pool._residents._tier.ids == bench.arena._tier.ids == ()
    bench.stage(TERMS[0])
    assert bench.step([TERMS[0]]) == [ResidencyState.READY]


def test_refusal_is_told_of_the_step_that_ends_when_its_sequence_has_let_go(bench):
    place(bench, [TERMS[0]])
    bench.step([TERMS[0]])
    bench.pool.pin([TERMS[0]])
    bench.device.launch(bench.pool, [TERMS[0].adapter_id])
    while bench.device.compute_one() or bench.device.copy_one():
        pass
    bench.step()
    bench.pool.unpin([TERMS[0]])  # its last row is planned
    refuse(bench)
    assert bench.step([TERMS[5]]) == [ResidencyState.LOADING]  # of three pages: would be given the place
    assert TERMS[0].adapter_id in bench.pool.settle([TERMS[0].adapter_id])


def test_adapter_on_trial_makes_room_for_nobody(bench):
    place(bench, [TERMS[0]])
    bench.step([TERMS[0]])
    while bench.device.copy_one():
        pass
    assert bench.pool.take_page() is not None
    assert [bench.pool.take_page() for _ in range(3)][-1] is None  # the other two were free
    assert bench.pool._loading._trials.is_on(TERMS[0].adapter_id)
    assert bench.pool.settle([TERMS[0].adapter_id]) == {}
    bench.step()
    assert bench.pool.take_page() is not None


def test_one_adapter_is_on_trial_at_a_time(bench):
    place(bench, [TERMS[0]])
    bench.step([TERMS[0]])
    bench.step([TERMS[1]])
    bench.loader.jobs.rotate(-1)
    bench.loader.end_one()
    bench.step([TERMS[1]])
    bench.loader.jobs.rotate(-1)
    assert not bench.loader.jobs[0][3]  # another one is being filled: its pages and its hash come together
    bench.loader.end_one()
    assert bench.step([TERMS[1]]) == [ResidencyState.READY]
    assert bench.pool._loading._trials.is_on(TERMS[0].adapter_id)


def test_wish_is_no_trial(bench):
    bench.pool.prefetch(TERMS[0])
    for _ in range(4):
        bench.pool.begin_step()
        bench.pool.grant_wishes()
        if bench.loader.jobs:
            assert not bench.loader.jobs[0][3]
            bench.loader.end_one()
    assert bench.pool.resident_ids == (TERMS[0].adapter_id,)
