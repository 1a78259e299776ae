"""Fair queueing: order, memory, and what is promised to tenants that want the engine at the same time."""

from contextlib import closing

from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.fairness import FairQueue
from node.engine.messages import Submit
from node.engine.sequence import Sequence
from node.request import AdapterTerm, Sampling


def sequence(index, tenant, adapter=None, weight=1):
    terms = () if adapter is None else (AdapterTerm(str(adapter), "/x", 1.0),)
    sampling = Sampling(max_new_tokens=1)
    submit = Submit(sequence_id=str(index), tenant=tenant, prompt_ids=(1,), terms=terms, sampling=sampling, weight=weight)
    return Sequence(submit, index, b"")


class Served:
    """Serves one sequence at a time, the fairest one, whole: the least that a batch can be."""

    def __init__(self):
        self.queue = FairQueue()
        self.tokens = {}
        self.count = 0

    def join(self, tenant, adapter=None, weight=1):
        self.queue.join(sequence(self.count, tenant, adapter, weight))
        self.count += 1

    def serve(self, cost):
        with closing(self.queue.in_order()) as walk:
            head = next(walk)
            self.queue.take(head)
        self.queue.charge(head.fair_key, cost)
        self.queue.leave(head)
        key = (head.tenant, head.terms[0].adapter_id if head.terms else None)
        self.tokens[key] = self.tokens.get(key, 0) + cost
        return head

    def of(self, tenant):
        return sum(tokens for key, tokens in self.tokens.items() if key[0] == tenant)


def names(queue):
    with closing(queue.in_order()) as walk:
        return [item.id for item in walk]


def test_order_prefers_the_least_served_tenant():
    queue = FairQueue()
    busy, quiet = sequence(0, "busy"), sequence(1, "quiet")
    queue.join(busy)
    queue.join(quiet)
    queue.charge(busy.fair_key, 10)
    assert names(queue) == ["1", "0"]


def test_order_inside_a_recipe_is_arrival():
    queue = FairQueue()
    for index in range(3):
        queue.join(sequence(index, "t"))
    seen = []
    for item in queue.in_order():
        seen.append(item.id)
        queue.take(item)
    assert seen == ["0", "1", "2"]


def test_order_inside_a_tenant_takes_turns_between_recipes():
    served = Served()
    for index in range(9):
        served.join("t", adapter="abc"[index // 3])
    assert [served.serve(4).terms[0].adapter_id for _ in range(9)] == list("abcabcabc")


def test_tenant_with_many_adapters_gets_no_more_than_one_with_one():
    served = Served()
    for index in range(100):
        served.join("many", adapter=index)
        served.join("one", adapter="a")
    for _ in range(100):
        served.serve(3)
    assert abs(served.of("many") - served.of("one")) <= 3


def test_heads_that_are_passed_over_come_again_in_the_next_walk():
    queue = FairQueue()
    for index, adapter in enumerate("aab"):
        queue.join(sequence(index, "t", adapter))
    assert names(queue) == ["0", "2"]
    assert names(queue) == ["0", "2"]


def test_walk_left_early_leaves_the_order_as_it_was():
    queue = FairQueue()
    for index, tenant in enumerate("abc"):
        queue.join(sequence(index, tenant))
    with closing(queue.in_order()) as walk:
        next(walk)
        next(walk)
    assert names(queue) == ["0", "1", "2"]


def test_preempted_sequence_is_before_its_recipes_others():
    queue = FairQueue()
    for index in range(3):
        queue.join(sequence(index, "t"))
    first = queue.first()
    queue.take(first)
    queue.put_back(first)
    assert queue.first() is first
    assert len(queue) == 3


def test_parked_recipe_is_out_of_the_order_until_it_is_loaded():
    queue = FairQueue()
    cold, hot = sequence(0, "t", "cold"), sequence(1, "t", "hot")
    queue.join(cold)
    queue.join(hot)
    queue.park(cold)
    queue.join(sequence(2, "t", "cold"))
    assert names(queue) == ["1"]
    assert queue.parked(16) == [cold]
    queue.unpark(cold)
    assert names(queue) == ["0", "1"]


def test_recipe_that_was_loaded_is_parked_before_those_that_never_were():
    queue = FairQueue()
    items = [sequence(index, "t", index) for index in range(20)]
    for item in items:
        queue.join(item)
        queue.park(item)
    for item in items[:2]:
        queue.unpark(item)
    for item in items[:2]:
        queue.park(item)
    assert [item.id for item in queue.parked(3)] == ["0", "1", "2"]
    assert len(queue.parked(100)) == 20


def test_loaded_recipes_are_those_that_were_parked_and_have_not_started():
    queue = FairQueue()
    items = [sequence(index, "t", index) for index in range(4)]
    for item in items:
        queue.join(item)
    for item in items[:3]:
        queue.park(item)
    assert queue.loaded(8) == []
    for item in items[:3]:
        queue.unpark(item)
    queue.take(items[0])
    queue.park(items[1])
    assert queue.loaded(8) == [items[2]]
    assert queue.parked(8) == [items[1]]


def test_recipe_without_waiting_sequences_forgets_that_it_was_loaded():
    queue = FairQueue()
    first, cold, later = sequence(0, "t", "again"), sequence(1, "t", "cold"), sequence(2, "t", "again")
    queue.join(first)
    queue.park(first)
    queue.unpark(first)
    queue.take(first)
    for item in (cold, later):
        queue.join(item)
        queue.park(item)
    assert [item.id for item in queue.parked(2)] == ["1", "2"]


def test_parked_heads_take_turns_between_tenants():
    queue = FairQueue()
    for index in range(100):
        item = sequence(index, "storm", index)
        queue.join(item)
        queue.park(item)
    other = sequence(100, "other", "cold")
    queue.join(other)
    queue.park(other)
    assert other in queue.parked(2)
    assert [item.id for item in queue.parked(4) if item.tenant == "storm"] == ["0", "1", "2"]


def test_cancel_of_a_parked_sequence_leaves_nothing_behind():
    queue = FairQueue()
    item = sequence(0, "t", "cold")
    queue.join(item)
    queue.park(item)
    queue.take(item)
    queue.leave(item)
    assert (len(queue), queue.parked(4), queue.first(), queue.weights()) == (0, [], None, {})


def test_join_after_absence_is_lifted_to_the_lowest_present():
    queue = FairQueue()
    stayed, newcomer = sequence(0, "stayed"), sequence(1, "newcomer")
    queue.join(stayed)
    queue.charge(stayed.fair_key, 100)
    queue.join(newcomer)
    assert queue.counter(newcomer.fair_key)[0] == 100


def test_join_after_leaving_keeps_what_was_served():
    queue = FairQueue()
    queue.join(sequence(0, "p"))
    returns = sequence(1, "r")
    queue.join(returns)
    queue.charge(returns.fair_key, 50)
    queue.take(returns)
    queue.leave(returns)
    again = sequence(2, "r")
    queue.join(again)
    assert queue.counter(again.fair_key)[0] == 50


def test_remembered_counters_are_bounded():
    queue = FairQueue(remembered_limit=2)
    queue.join(sequence(0, "present"))
    for index in range(1, 6):
        for item in (sequence(index, f"tenant-{index}"), sequence(10 + index, "present", index)):
            queue.join(item)
            queue.take(item)
            queue.leave(item)
    assert len(queue._away) == 2
    assert len(queue._tenants["present"].away) == 2


# ---- promises

WEIGHTS = {"a": 1, "b": 2, "c": 5}
COST = st.integers(1, 20)


@given(st.lists(COST, min_size=1, max_size=200), st.integers(1, 40), st.randoms(use_true_random=False))
def test_backlogged_tenants_are_served_by_weight_whatever_their_adapters(costs, adapter_count, random):
    served = Served()
    for tenant, weight in WEIGHTS.items():
        for _ in range(len(costs)):
            served.join(tenant, adapter=random.randrange(adapter_count if tenant == "a" else 1), weight=weight)
    for cost in costs:
        served.serve(cost)
        virtual = [served.of(tenant) / weight for tenant, weight in WEIGHTS.items()]
        assert max(virtual) - min(virtual) <= max(costs) + 1e-6


@given(st.lists(st.tuples(st.sampled_from("ab"), COST), max_size=150))
def test_newcomer_waits_for_at_most_one_turn_of_everyone_present(history):
    served = Served()
    for tenant, _ in history:
        served.join(tenant)
    for _, cost in history[: len(history) // 2]:
        served.serve(cost)
    served.join("newcomer")
    turns = 0
    while served.serve(20).tenant != "newcomer":
        turns += 1
    assert turns <= 2


@given(st.integers(1, 300), COST)
def test_idling_earns_no_credit(idle_turns, cost):
    served = Served()
    served.join("idler")
    served.serve(1)
    for _ in range(idle_turns + 50):
        served.join("worker")
    for _ in range(idle_turns):
        served.serve(cost)
    before = served.of("worker")
    for _ in range(50):
        served.join("idler")
    idler_before = served.of("idler")
    for _ in range(20):
        served.serve(cost)
    assert served.of("idler") - idler_before <= served.of("worker") - before + cost


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "serve", "cancel", "park", "unpark", "still", "favour", "preempt", "finish"]),
            st.sampled_from("abc"),
            st.integers(0, 4),
        ),
        max_size=120,
    )
)
def test_whatever_happens_nobody_is_lost_and_the_order_is_by_counters(steps):
    queue, waiting, running, parked = FairQueue(), [], [], set()
    for index, (action, tenant, adapter) in enumerate(steps):
        if action == "join":
            item = sequence(index, tenant, adapter)
            queue.join(item)
            waiting.append(item)
        elif action == "serve" and (head := queue.first()) is not None:
            queue.take(head)
            queue.charge(head.fair_key, adapter + 1)
            waiting.remove(head)
            running.append(head)
        elif action == "cancel" and waiting:
            item = waiting.pop(adapter % len(waiting))
            queue.take(item)
            queue.leave(item)
        elif action == "park" and (head := queue.first()) is not None:
            queue.park(head)
            parked.add(head.fair_key)
        elif action == "unpark" and (heads := queue.parked(1)):
            queue.unpark(heads[0])
            parked.discard(heads[0].fair_key)
        elif action == "still":  # looked at, and still on their way
            for head in queue.parked(2):
                queue.park(head)
        elif action == "favour":
            with closing(queue.in_order()) as walk:
                before = {item.fair_key for item in walk}
            queue.favour(2, lambda item, least=adapter: int(item.id) % 5 >= least)
            with closing(queue.in_order()) as walk:
                parked |= before - {item.fair_key for item in walk}
        elif action == "preempt" and running:
            item = running.pop()
            queue.put_back(item)
            waiting.append(item)
        elif action == "finish" and running:
            queue.leave(running.pop(0))
        parked &= {item.fair_key for item in waiting}
        assert sorted(item.id for item in queue) == sorted(item.id for item in waiting)
        assert len(queue) == len(waiting)
        with closing(queue.in_order()) as walk:
            heads = list(walk)
        assert {item.fair_key for item in heads} == {item.fair_key for item in waiting} - parked
        assert sorted(item.fair_key for item in queue.parked(100)) == sorted(parked)  # none of them twice
        ranks = [queue.counter(item.fair_key) for item in heads]
        tenants = [rank[0] for rank in ranks]
        assert tenants == sorted(tenants)


def test_recipe_that_was_loaded_and_is_passed_over_waits_in_one_place():
    queue = FairQueue()
    for index, name in enumerate("ab"):
        queue.join(sequence(index, "t", name))
    queue.park(queue.first())
    queue.unpark(queue.parked(1)[0])
    assert queue.favour(9, lambda item: item.terms[0].adapter_id == "b")
    for item in queue.parked(9):
        queue.park(item)  # still on its way
    assert [item.id for item in queue.parked(9)] == ["0"]


def test_favoured_recipes_go_first_and_the_others_wait_in_order():
    queue = FairQueue()
    for index, name in enumerate("abcd"):
        queue.join(sequence(index, "t", name))
    queue.charge(("t", (("a", 1.0),)), 5)
    assert queue.favour(9, lambda item: item.terms[0].adapter_id in "bd")
    assert names(queue) == ["1", "3"]
    assert [item.id for item in queue.parked(9)] == ["2", "0"]
    assert [item.id for item in queue.loaded(9)] == ["1", "3"]


def test_favour_for_all_or_nobody_changes_nothing():
    queue = FairQueue()
    for index, name in enumerate("ab"):
        queue.join(sequence(index, "t", name))
    assert not queue.favour(9, lambda item: True)
    assert not queue.favour(9, lambda item: False)
    assert names(queue) == ["0", "1"]
    assert not queue.parked(9)
    assert not queue.loaded(9)


def test_no_more_recipes_are_favoured_than_the_limit():
    queue = FairQueue()
    for index, name in enumerate("abcd"):
        queue.join(sequence(index, "t" if name < "c" else "u", name))
    queue.charge(("t", (("a", 1.0),)), 5)
    assert queue.favour(1, lambda item: item.terms[0].adapter_id != "b")
    assert names(queue) == ["2"]
    assert {item.id for item in queue.parked(9)} == {"0", "1", "3"}
