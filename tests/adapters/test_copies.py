"""Adapters on their way to a device."""

import pytest

from node.adapters.copies import SEEN_STEPS, SHARE, Copies


class Arrival:
    def __init__(self, seconds=1.0, early_share=None):
        self.done, self.joins, self._seconds, self.early_share = False, 0, seconds, early_share

    def is_done(self):
        return self.done

    def join(self):
        self.joins += 1

    def seconds(self):
        return self._seconds


class Bench:
    """Copies of 100 bytes, and a clock that moves by a step's length."""

    def __init__(self):
        self.now_s = 0.0
        self.copies = Copies(lambda: self.now_s)
        self.arrivals = {}

    def send(self, name, seconds=1.0, early_share=None):
        self.arrivals[name] = Arrival(seconds, early_share)
        self.copies.add(name, self.arrivals[name], 100)

    def step(self, length_s, *done):
        for name in done:
            self.arrivals[name].done = True
        self.now_s += length_s
        return self.copies.begin_step()


@pytest.fixture
def bench():
    """One copy was seen to take a second, and steps to take four."""
    bench = Bench()
    bench.send("seen")
    for _ in range(SEEN_STEPS):
        bench.step(4.0)
    assert bench.step(4.0, "seen") == ["seen"]
    return bench


def test_copy_sent_for_this_step_is_not_hidden(bench):
    bench.send("a")
    assert not bench.copies.is_hidden("a")
    bench.step(4.0)
    assert bench.copies.is_hidden("a")


def test_only_as_many_copies_are_hidden_as_fit_behind_a_step(bench):
    for name in "abcd":
        bench.send(name)
    bench.step(4.0)
    assert [bench.copies.is_hidden(name) for name in "abcd"] == [index + 1 <= 4 * SHARE for index in range(4)]
    bench.step(4.0, "a", "b")
    assert [bench.copies.is_hidden(name) for name in "cd"] == [True, True]


def test_shortest_step_and_slowest_copy_are_counted_on(bench):
    bench.send("a")
    bench.step(1.0)
    assert not bench.copies.is_hidden("a")
    for _ in range(SEEN_STEPS):
        bench.step(4.0)
    assert bench.copies.is_hidden("a")
    bench.send("slow", seconds=3.0)
    bench.step(4.0, "slow")
    assert not bench.copies.is_hidden("a")


def test_nothing_is_hidden_before_a_copy_was_seen():
    bench = Bench()
    bench.send("a")
    for _ in range(SEEN_STEPS):
        bench.step(100.0)
    assert not bench.copies.is_hidden("a")


def test_join_waits_for_copies_under_way_only(bench):
    bench.send("a")
    seen = bench.arrivals["seen"].joins
    bench.copies.join("a")
    bench.copies.join("seen")
    assert (bench.arrivals["a"].joins, bench.arrivals["seen"].joins) == (1, seen)
    assert "a" in bench.copies
    bench.step(1.0, "a")
    assert len(bench.copies) == 0


def test_copy_in_halves_is_hidden_in_the_step_it_was_sent_in(bench):
    bench.send("a", early_share=0.5)  # half a second of the two that are left behind a step's middle
    assert bench.copies.is_hidden("a")


def test_only_as_many_first_halves_are_hidden_as_fit_behind_a_middle(bench):
    for name in "abc":
        bench.send(name, early_share=0.5)
    assert [bench.copies.is_hidden(name) for name in "abc"] == [True, True, False]
    for name in "ab":
        bench.copies.join(name)
    assert not bench.copies.is_hidden("c")


def test_second_halves_of_adapters_in_use_do_not_count(bench):
    for name in "ab":
        bench.send(name, early_share=0.5)
        bench.copies.join(name)
    bench.step(4.0)
    for name in "cd":
        bench.send(name, early_share=0.5)
    assert bench.copies.is_hidden("d")


def test_copy_in_halves_behind_whole_ones_is_not_early(bench):
    bench.send("whole")
    bench.send("a", early_share=0.5)
    assert not bench.copies.is_hidden("a")


def test_tables_of_a_copy_that_nobody_waited_for_are_shown(bench):
    bench.send("a", early_share=0.5)
    bench.send("whole")
    bench.step(4.0, "a", "whole")
    assert (bench.arrivals["a"].joins, bench.arrivals["whole"].joins) == (1, 1)


def test_no_more_copies_begin_in_a_step_than_arrive_behind_one(bench):
    for name in "ab":
        assert not bench.copies.is_full(1000)
        bench.send(name)
    assert not bench.copies.is_full(1000)  # two seconds of the 2.8 that count
    bench.send("c")
    assert bench.copies.is_full(1000)
    bench.step(4.0)
    assert not bench.copies.is_full(1000)
    assert bench.copies.is_full(300)


def test_first_copies_are_bounded_by_their_bytes_alone():
    bench = Bench()
    for name in "abcdef":
        assert not bench.copies.is_full(600)
        bench.send(name)
    assert bench.copies.is_full(600)
