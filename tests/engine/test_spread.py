"""Which steps are kept short, and that prompts which came together come apart."""

import pytest

from node.engine.fairness import FairQueue
from node.engine.spread import Spread

SHORT, LONG = 20, 40
SIZES = ((SHORT, 30), (LONG, 120))


class Bench:
    def __init__(self, running, make_sequence):
        self.running = running
        self.make_sequence = make_sequence
        self.queue = FairQueue()
        self.spread = Spread(running, self.queue, SIZES)
        self.count = 0

    def wait(self, count, prompt_count, *, is_parked=False):
        for _ in range(count):
            sequence = self.make_sequence(self.count, prompt_count=prompt_count, tenant=f"t{self.count}")
            self.count += 1
            self.queue.join(sequence)
            if is_parked:
                self.queue.park(sequence)

    def start(self, count, prompt_count):
        for _ in range(count):
            sequence = self.make_sequence(self.count, prompt_count=prompt_count, tenant=f"t{self.count}")
            self.count += 1
            self.running.start(sequence, [])


@pytest.fixture
def bench(make_running, make_sequence):
    return Bench(make_running(block_count=256, place_count=4), make_sequence)


def test_prompts_are_spread_while_another_waits_for_its_adapter(bench):
    bench.wait(2, 15)
    bench.wait(1, 6, is_parked=True)
    assert bench.spread.limit(3) == SHORT


def test_more_prompts_are_spread_over_longer_steps(bench):
    bench.wait(2, 16)
    bench.wait(1, 6, is_parked=True)
    assert bench.spread.limit(3) == LONG


def test_prompts_are_spread_while_another_waits_for_a_place(bench):
    bench.start(2, 15)
    bench.wait(3, 15)
    assert bench.spread.limit(2) == LONG


def test_steps_are_filled_where_all_that_wait_could_start(bench):
    bench.wait(4, 15)
    assert bench.spread.limit(3) is None


def test_steps_are_filled_where_prompts_would_take_many(bench):
    bench.wait(4, 31)
    bench.wait(1, 6, is_parked=True)
    assert bench.spread.limit(3) is None


@pytest.mark.parametrize("decode_count", [0, LONG, LONG + 1])
def test_steps_are_filled_where_nobody_decodes_or_no_row_would_be_left(bench, decode_count):
    bench.wait(2, 15)
    bench.wait(1, 6, is_parked=True)
    assert bench.spread.limit(decode_count) is None


def test_short_steps_leave_rows_beside_many_decodes(bench):
    bench.wait(2, 15)
    bench.wait(1, 6, is_parked=True)
    assert bench.spread.limit(SHORT) == LONG


def test_first_step_is_short_where_more_wait_than_could_start(bench):
    bench.wait(5, 31)
    assert bench.spread.limit(0) == SHORT
    bench.start(1, 15)
    assert bench.spread.limit(0) is None


def test_first_step_is_filled_where_all_that_wait_could_start(bench):
    bench.wait(4, 31)
    assert bench.spread.limit(0) is None


def test_short_steps_must_keep_up_with_the_prompts_of_late(bench):
    bench.wait(2, 15)
    bench.wait(1, 6, is_parked=True)
    for _ in range(200):
        bench.spread.note(SHORT - 3)
    assert bench.spread.limit(3) == SHORT
    for _ in range(200):
        bench.spread.note(SHORT)
    assert bench.spread.limit(3) == LONG
    for _ in range(400):
        bench.spread.note(0)
    assert bench.spread.limit(3) == SHORT


def test_devices_without_sizes_spread_nothing(bench):
    bench.wait(2, 15)
    bench.wait(1, 6, is_parked=True)
    assert Spread(bench.running, bench.queue, ()).limit(3) is None
