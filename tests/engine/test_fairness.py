from node.engine.fairness import FairQueue
from node.engine.messages import Submit
from node.engine.sequence import Sequence
from node.request import Sampling


def sequence(index, tenant):
    submit = Submit(sequence_id=str(index), tenant=tenant, prompt_ids=(1,), terms=(), sampling=Sampling(max_new_tokens=1))
    return Sequence(submit, index, b"")


def test_order_prefers_the_least_served_client():
    queue = FairQueue()
    busy, quiet = sequence(0, "busy"), sequence(1, "quiet")
    queue.join(busy)
    queue.join(quiet)
    queue.charge(busy.fair_key, 10)
    assert [item.id for item in queue.in_order()] == ["1", "0"]


def test_order_inside_a_client_is_arrival():
    queue = FairQueue()
    items = [sequence(index, "t") for index in range(3)]
    for item in items:
        queue.join(item)
    seen = []
    for item in queue.in_order():
        seen.append(item.id)
        queue.take(item)
    assert seen == ["0", "1", "2"]


def test_join_after_absence_is_lifted_to_the_lowest_present():
    queue = FairQueue()
    stayed, newcomer = sequence(0, "stayed"), sequence(1, "newcomer")
    queue.join(stayed)
    queue.charge(stayed.fair_key, 100)
    queue.join(newcomer)
    assert queue.counter(newcomer.fair_key) == 100


def test_join_after_leaving_keeps_what_was_served():
    queue = FairQueue()
    keeps_present, returns = sequence(0, "p"), sequence(1, "r")
    queue.join(keeps_present)
    queue.join(returns)
    queue.charge(returns.fair_key, 50)
    queue.take(returns)
    queue.leave(returns)
    again = sequence(2, "r")
    queue.join(again)
    assert queue.counter(again.fair_key) == 50


def test_remembered_counters_are_bounded():
    queue = FairQueue(remembered_limit=2)
    queue.join(sequence(0, "present"))
    for index in range(1, 6):
        item = sequence(index, f"tenant-{index}")
        queue.join(item)
        queue.take(item)
        queue.leave(item)
    assert len(queue._away) == 2
