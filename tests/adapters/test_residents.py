"""Who has which place in the memory that steps compute from."""

import pytest
import torch

from node.adapters.page_store import HostPages
from node.adapters.residents import Residents
from node.kernels.layout import PageLayout
from tests.adapters.test_pool_tiers import file_plan

LAYOUT = PageLayout([("m", 2, 3)], 4)


class Bench:
    """Residents of two pages."""

    def __init__(self):
        store = HostPages(LAYOUT, torch.float32, memory_bytes=2 * 4 * LAYOUT.page_elements, max_rank=8)
        self.left = []
        self.residents = Residents(LAYOUT, store, on_leave=self.left.append)

    def admit(self, name, page_count=1):
        assert self.residents.claim(name, page_count, ()) is not None
        self.residents.admit(name, file_plan(4 * page_count))
        self.residents.unpin(name)


@pytest.fixture
def bench():
    return Bench()


def test_adapter_that_claimed_a_place_may_be_named_once_it_is_admitted(bench):
    bench.residents.claim("a", 1, ())
    assert bench.residents.has_place("a")
    assert "a" not in bench.residents
    with pytest.raises(KeyError):
        bench.residents.slot_of("a")
    bench.residents.admit("a", file_plan(4))
    assert bench.residents.ids == ("a",)
    assert bench.residents.slot_of("a") == bench.residents.place_of("a").slot


def test_adapter_that_leaves_is_told_of_and_leaves_nothing(bench):
    bench.admit("a")
    bench.admit("b")
    slot = bench.residents.slot_of("a")
    assert bench.residents.claim("c", 1, ()) is not None
    assert bench.left == ["a"]
    assert bench.residents.layer_ranks[slot] == 0
    assert bench.residents.evictions_total == 1
    assert not bench.residents.has_place("a")


def test_pages_for_which_wanted_adapters_had_to_leave_are_not_given(bench):
    bench.admit("a")
    bench.admit("b")
    assert bench.residents.claim("c", 2, {"a"}) is None
    assert bench.residents.take_page({"a", "b"}) is None
    assert bench.left == []


def test_pages_are_borrowed_where_nobody_can_leave(bench):
    bench.admit("a", page_count=2)
    bench.residents.pin("a")
    page, asked = bench.residents.place_of("a").pages[1], []

    def lend(count):
        asked.append(count)
        bench.residents.end_run("a")  # what lends makes room

    bench.residents.borrow_from(lend)
    place = bench.residents.claim("b", 2, ())
    assert asked == [2]
    assert place is not None
    assert page in place.pages


def test_abandoned_place_is_free_and_was_no_eviction(bench):
    bench.residents.claim("a", 2, ())
    assert bench.residents.is_pinned("a")
    bench.residents.abandon("a")
    assert not bench.residents.has_place("a")
    assert (bench.residents.evictions_total, bench.left) == (0, [])
    assert bench.residents.take_page(()) is not None
