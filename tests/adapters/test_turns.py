"""Whose turn it is: shares of places and workers, by weight, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.adapters.turns import Turns

TENANTS = "abcd"
STEPS = st.lists(st.tuples(st.sampled_from(("join", "leave", "start", "share")), st.sampled_from(TENANTS), st.integers(0, 40)))


def fill(turns, tenant, count, first=0):
    """`count` new items of a tenant; those that gave way."""
    refused = [turns.join(tenant, (tenant, number)) for number in range(first, first + count)]
    return [item for item in refused if item is not None]


def started(turns):
    """Start whatever may run."""
    items = []
    while (item := turns.start()) is not None:
        items.append(item)
    return items


def tenants_of(items):
    return "".join(tenant for tenant, _ in items)


class Model:
    """What `Turns` should know, kept the plain way."""

    def __init__(self, workers, limit, weights):
        self.turns = Turns(workers=workers, limit=limit, weight_of=weights.__getitem__)
        self.workers, self.limit, self.weights = min(workers, limit), limit, weights
        self.waiting, self.running = {}, {}  # item -> tenant
        self.serial = 0

    def of(self, tenant):
        return [item for table in (self.waiting, self.running) for item, owner in table.items() if owner == tenant]

    def surplus(self, tenant):
        return (len(self.of(tenant)) - 1) / self.weights[tenant]

    def join(self, tenant, _):
        self.serial += 1
        had, is_full = len(self.of(tenant)), len(self.waiting) + len(self.running) == self.limit
        refused = self.turns.join(tenant, self.serial)
        self.waiting[self.serial] = tenant
        assert (refused is not None) == is_full
        if refused is not None:
            loser = self.waiting[refused]
            most = max(map(self.surplus, self.waiting.values()))
            assert self.surplus(loser) == most
            assert had or loser != tenant or most == 0  # refused with nothing there: nobody who waits has more than one
            del self.waiting[refused]

    def leave(self, _, choice):
        items = [*self.waiting, *self.running]
        if items:
            item = items[choice % len(items)]
            self.turns.leave(item)
            self.waiting.pop(item, None)
            self.running.pop(item, None)

    def start(self, *_):
        item = self.turns.start()
        runs = {tenant: list(self.running.values()).count(tenant) for tenant in TENANTS}
        free = self.workers - len(self.running)
        may = [tenant for tenant in self.waiting.values() if free > 1 or (free == 1 and not runs[tenant])]
        if item is None:
            assert not may
            return
        tenant = self.waiting.pop(item)
        assert tenant in may
        assert runs[tenant] / self.weights[tenant] == min(runs[other] / self.weights[other] for other in may)
        self.running[item] = tenant

    def share(self, tenant, choice):
        items = [*self.waiting, *self.running]
        if items:
            item = items[choice % len(items)]
            owner = self.waiting.get(item)
            moves = owner not in (None, tenant) and len(self.of(tenant)) / self.weights[tenant] < self.surplus(owner)
            self.turns.share(tenant, item)
            if moves:
                del self.waiting[item]
                self.waiting[item] = tenant


@given(
    workers=st.integers(1, 6),
    limit=st.integers(1, 12),
    weights=st.fixed_dictionaries(dict.fromkeys(TENANTS, st.integers(1, 3))),
    steps=STEPS,
)
def test_turns_follow_their_rules_whatever_comes(workers, limit, weights, steps):
    model = Model(workers, limit, weights)
    for step, tenant, choice in steps:
        getattr(model, step)(tenant, choice)
        assert len(model.turns) == len(model.waiting) + len(model.running) <= limit
        assert len(model.running) <= model.workers
    for _ in range(limit):  # nothing is lost: what waits runs as what runs ends
        model.start()
        if model.running:
            model.leave(None, len(model.waiting))
    assert not model.waiting


@given(
    workers=st.integers(1, 5),
    weights=st.fixed_dictionaries(dict.fromkeys(TENANTS, st.integers(1, 50))),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=60),
)
def test_tenant_that_runs_nothing_waits_for_at_most_one_turn_of_each_other(workers, weights, steps):
    turns = Turns(workers=workers, limit=1000, weight_of=weights.__getitem__)
    running, before = [], dict.fromkeys("abc", 0)
    for tenant in "abc":
        fill(turns, tenant, 3)
    running += started(turns)
    turns.join("d", ("d", 0))
    for serial, (tenant, ended) in enumerate(steps):
        fill(turns, tenant, 2, first=100 + 2 * serial)
        if running:
            turns.leave(running.pop(ended % len(running)))
        now = started(turns)
        running += now
        if ("d", 0) in now:
            now = now[: now.index(("d", 0))]
        for item in now:
            before[item[0]] += 1
        if ("d", 0) in running:
            break
    assert max(before.values()) <= 1


def test_tenant_alone_uses_all_workers_but_one_and_a_newcomer_finds_that_one():
    turns = Turns(workers=4, limit=64)
    fill(turns, "a", 64)
    assert tenants_of(started(turns)) == "aaa"
    fill(turns, "b", 2)
    assert started(turns) == [("b", 0)]
    turns.leave(("a", 0))
    assert started(turns) == []  # the last one is free again, and both run something
    turns.leave(("b", 0))
    assert started(turns) == [("b", 1)]


def test_full_queue_takes_a_newcomer_and_refuses_the_newest_of_who_has_most():
    turns = Turns(workers=4, limit=8)
    assert fill(turns, "a", 10) == [("a", 8), ("a", 9)]
    assert fill(turns, "b", 6) == [("a", 7), ("a", 6), ("a", 5), ("a", 4), ("b", 4), ("b", 5)]


def test_running_items_never_give_way():
    turns = Turns(workers=4, limit=4)
    fill(turns, "a", 4)
    assert started(turns) == [("a", 0), ("a", 1), ("a", 2)]
    assert turns.join("b", ("b", 0)) == ("a", 3)
    assert started(turns) == [("b", 0)]
    assert turns.join("b", ("b", 1)) == ("b", 1)


@pytest.mark.parametrize("weight", [1, 3])
def test_workers_are_shared_by_weight(weight):
    turns = Turns(workers=8, limit=64, weight_of={"a": 1, "b": weight}.__getitem__)
    fill(turns, "a", 20)
    fill(turns, "b", 20)
    running = started(turns)
    for _ in range(12):
        turns.leave(running.pop(0))
        running += started(turns)
        assert len(running) == 7  # the eighth worker is for somebody who runs nothing
    assert abs(tenants_of(running).count("b") - 7 * weight / (weight + 1)) <= 1


def test_light_tenant_with_nothing_there_is_taken_in_before_a_heavy_one_keeps_its_second():
    turns = Turns(workers=1, limit=10, weight_of={"heavy": 1000, "light": 1}.__getitem__)
    fill(turns, "heavy", 10)
    assert turns.join("light", ("light", 0)) == ("heavy", 9)


def test_one_worker_goes_round_however_often_a_tenant_comes_back():
    turns = Turns(workers=1, limit=64)
    fill(turns, "a", 1)
    fill(turns, "b", 2)
    order = []
    for number in range(1, 5):
        item = turns.start()
        order.append(item[0])
        turns.leave(item)
        fill(turns, "a", 1, first=number)
    assert "".join(order) == "abab"


def test_waiting_item_that_another_tenant_wants_too_counts_for_who_has_less():
    turns = Turns(workers=2, limit=64)
    fill(turns, "a", 10)
    assert started(turns) == [("a", 0)]
    turns.share("b", ("a", 9))
    assert started(turns) == [("a", 9)]  # the last worker, which a may not have


def test_running_item_stays_with_whom_it_was_started_for():
    turns = Turns(workers=3, limit=64)
    fill(turns, "a", 3)
    assert started(turns) == [("a", 0), ("a", 1)]
    turns.share("b", ("a", 1))
    fill(turns, "b", 1)
    assert started(turns) == [("b", 0)]
