from hypothesis import given
from hypothesis import strategies as st

from node.engine.counter_heap import CounterHeap


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "grow"]), st.integers(0, 9), st.integers(0, 5)), max_size=80))
def test_least_is_the_minimum_whatever_grew_came_or_went(steps):
    counters = dict.fromkeys(range(10), 0)
    heap = CounterHeap(lambda member: counters[member])
    inside = set()
    for action, member, amount in steps:
        if action == "add":
            heap.add(member)
            inside.add(member)
        elif action == "remove":
            heap.remove(member)
            inside.discard(member)
        else:
            counters[member] += amount
        least = heap.least()
        assert set(heap) == inside
        assert (least is None) == (not inside)
        assert least is None or counters[least] == min(counters[item] for item in inside)


def test_dead_entries_stay_few():
    heap = CounterHeap(lambda member: 0)
    for _ in range(10_000):
        heap.add("a")
    assert len(heap) == 1
    assert len(heap._entries) < 100
